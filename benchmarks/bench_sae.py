"""Our training step against sae-lens's SAETrainer: same start, same batches, same schedule, fp32 and autocast.

Speed is measured step by step in turns, in CPU time and by the wall clock; where another environment is named
(benchmarks/peers/dictionaries.txt), dictionary_learning and eai-sparsify take turns too. Quality is that on held-out
rows after both were trained (the same number of steps, several seeds). The data are sums of features that fire in a
hierarchy and with a skewed frequency, in superposition.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, Row, interleaved, save, table
from benchmarks.sae_lens_peer import sae_lens_trainer
from benchmarks.sae_speed import ELSEWHERE, elsewhere, here, in_turns, product, trained_elsewhere
from saes.config import BatchTopKConfig, MatryoshkaConfig, TopKConfig, TrainConfig
from saes.engine.inference import inference
from saes.engine.trainer import Trainer

NAME = "sae"

SIZES, K, BATCH, EXPANSION = (128, 256, 768), 32, 4096, 16
KINDS = {"topk": TopKConfig, "batchtopk": BatchTopKConfig, "matryoshka": MatryoshkaConfig}
LEARNING_RATE = 1e-3
QUALITY = ((128, 3), (256, 3), (768, 1))
"""Sizes at which quality is held beside the other packages', and seeds: the others take minutes a run at 768."""
UNSCALED = "largest without decoder norms"


def run(quick: bool = False) -> list[Row]:
    """Speed at each size and kind, quality at the sizes that train in minutes, share of the matrix peak."""
    sizes, repeats = ((128,), 2) if quick else (SIZES, 5)
    rows = []
    for d in sizes:
        batches = [next(stream) for stream in [structured(d, seed=0)] for _ in range(3)]
        for kind in KINDS:
            rows += _speed(kind, d, batches, repeats)
    for kind in KINDS:
        rows += _quality(kind, 128, 30 if quick else 60, seeds=1 if quick else 3)
    return rows


def run_long() -> Iterator[list[Row]]:
    """Quality at the larger sizes and of a longer run, three seeds: `python -m benchmarks.bench_sae long`.

    About 25 CPU minutes. Yields the rows so far after each kind.
    """
    rows: list[Row] = []
    for d, steps, batch in ((256, 60, 1024), (768, 40, 512), (128, 250, 1024)):
        for kind in KINDS:
            rows += _quality(kind, d, steps, seeds=3, batch=batch)
            yield rows


def run_peers() -> Iterator[list[Row]]:
    """Speed of each kind beside every other package: `python -m benchmarks.bench_sae peers`.

    About 12 CPU minutes. Yields the rows so far after each kind.
    """
    rows: list[Row] = []
    for d in SIZES:
        batches = [next(stream) for stream in [structured(d, seed=0)] for _ in range(3)]
        for kind in KINDS:
            rows += _speed(kind, d, batches, repeats=3)
            yield rows


def run_quality() -> Iterator[list[Row]]:
    """Held-out quality of TopK beside the other packages: `python -m benchmarks.bench_sae quality`.

    Each starts as it likes; batches, rate and schedule are the same. About 25 CPU minutes. Yields the rows so far after
    each size.
    """
    lines: list[Row] = []
    for d, seeds in QUALITY:
        lines += _beside_others(d, seeds)
        yield lines


def _beside_others(d: int, seeds: int, steps: int = 200, rows: int = 1024) -> list[Row]:
    found: dict[str, list[dict[str, float]]] = {}
    held_out = torch.cat([next(structured(d, seed=777)) for _ in range(2)])
    for seed in range(seeds):
        batches = list(islice(structured(d, seed, rows), steps))
        for name, start in (("ours", "fitted"), ("ours from sae-lens's start", "sae-lens")):
            ours = Trainer(replace(_config("topk", d, rows), start=start), d, batches[0].mean(0), steps, seed)
            for batch in batches:
                ours.step(batch)
            found.setdefault(name, []).append(_scores(_finished(ours), held_out))
        for package in ELSEWHERE["topk"]:
            there = trained_elsewhere(package, [*batches, held_out], K, EXPANSION * d, seed)
            found.setdefault(package, []).append(there)
    lines: list[Row] = []
    for package, theirs in found.items():
        for name in ("R2", "L0", "dead"):
            pairs = [(mine[name], other[name]) for mine, other in zip(found["ours"], theirs, strict=True)]
            a, b = (statistics.mean(values) for values in zip(*pairs, strict=True))
            case = f"topk d={d}, {steps} steps of {rows}, {_counted(len(pairs))}: held-out {name}"
            worst = max(abs(one - other) for one, other in pairs)
            ratio = (b / a if name == "dead" else a / b) if a and b else 1.0  # none dead has no ratio
            if package != "ours":
                lines.append(Row(case, a, b, package, "1", ratio, worst))
    return lines


def _counted(seeds: int) -> str:
    return f"{seeds} seed{'s' * (seeds > 1)}"


def structured(d: int, seed: int, rows: int = BATCH) -> Iterator[Tensor]:
    """Batches of mean norm sqrt(d): 8 d features, each the child of one of d / 2 parents, Zipf-like frequencies."""
    shape = torch.Generator().manual_seed(1000 + d)
    directions = torch.nn.functional.normalize(torch.randn(8 * d, d, generator=shape), dim=-1)
    parent = torch.randint(d // 2, (8 * d,), generator=shape)
    rate = (torch.arange(1, 8 * d + 1).float() ** -0.7)[torch.randperm(8 * d, generator=shape)]
    rate *= 24 / rate.sum()
    chance = torch.Generator().manual_seed(seed)
    scale = None
    while True:
        with_parent = torch.rand(rows, d // 2, generator=chance) < 0.5
        fires = torch.rand(rows, 8 * d, generator=chance) < 2 * rate
        fires &= with_parent[:, parent]
        size = 0.5 + torch.rand(rows, 8 * d, generator=chance)
        x = (fires * size) @ directions + 0.02 * torch.randn(rows, d, generator=chance)
        scale = d**0.5 / x.norm(dim=-1).mean() if scale is None else scale
        yield x * scale


def _config(kind: str, d: int, batch: int = BATCH) -> TrainConfig:
    return KINDS[kind](k=K, width=EXPANSION * d, batch_size=batch, lr=LEARNING_RATE, dead_after=100)


def _speed(kind: str, d: int, batches: list[Tensor], repeats: int) -> list[Row]:
    """Rows a second of ours, of the fastest mode of sae-lens, and of the other packages, all in turns."""
    ours = Trainer(_config(kind, d), d, batches[0].mean(0), 1000)
    modes: dict[str, dict[str, bool]] = {"sae-lens fp32": {}, f"sae-lens fp32, {UNSCALED}": {"rescaled": False}}
    if _bf16_is_fast():
        modes |= {name.replace("fp32", "autocast"): {"autocast": True, **mode} for name, mode in modes.items()}
    runs = {"ours": here(ours, batches), "product": product(batches[0], EXPANSION * d)}
    runs |= {name: here(sae_lens_trainer(ours, **mode), batches) for name, mode in modes.items()}
    with ExitStack() as stack:
        others = [stack.enter_context(other) for other in elsewhere(kind, batches, K, EXPANSION * d)]
        seconds = in_turns(runs | {other.name: other for other in others}, repeats)
    threads = torch.get_num_threads()
    size = f"{kind} d={d}, {EXPANSION * d} latents, k={K}, batch {BATCH}, {threads} thread{'s' * (threads > 1)}"
    rows = []
    for clock, unit in (("cpu", "rows/CPU-s"), ("wall", "rows/s")):
        spent = {name: getattr(found, clock) for name, found in seconds.items()}
        mine, alone = spent.pop("ours"), spent.pop("product")
        case = f"{size}: {'CPU time' if clock == 'cpu' else 'wall clock'}"
        for name in spent:
            rows.append(Row(case, BATCH / mine, BATCH / spent[name], name, unit, spent[name] / mine, None))
        speed = 2 * BATCH * d * EXPANSION * d / alone / 1e9
        rows.append(
            Row(
                f"{case}, share of peak",
                alone / mine,
                1.0,
                f"one product at {speed:.0f} GFLOP/s",
                "1",
                alone / mine,
                None,
            )
        )
    return rows


def _bf16_is_fast() -> bool:
    """Whether bf16 products are at least half as fast as fp32 ones; where they are emulated, autocast is no rival."""
    x = torch.randn(512, 512)
    seconds = interleaved({str(y.dtype): lambda y=y: y @ y for y in (x, x.bfloat16())}, 5)
    return seconds["torch.bfloat16"] < 2 * seconds["torch.float32"]


@torch.no_grad()
def _scores(dictionary: Any, x: Tensor) -> dict[str, float]:
    from saes.metrics import dead, l0, r2

    acts = dictionary.encode(x)
    return {"R2": r2(x, dictionary.decode(acts)), "L0": l0(acts), "dead": dead(acts)}


def _quality(kind: str, d: int, steps: int, seeds: int, batch: int = BATCH) -> list[Row]:
    """Held-out R2, L0 and dead latents of both after the same training."""
    found: dict[str, list[tuple[float, float]]] = {"R2": [], "L0": [], "dead": []}
    held_out = torch.cat([next(structured(d, seed=777)) for _ in range(2)])
    for seed in range(seeds):
        stream = structured(d, seed, batch)
        first = next(stream)
        ours = Trainer(_config(kind, d, batch), d, first.mean(0), steps, seed)
        theirs = sae_lens_trainer(ours)
        for _ in range(steps):
            x = next(stream)
            ours.step(x)
            theirs.step(x)
            theirs.n_training_steps += 1
        mine, other = _scores(_finished(ours), held_out), _scores(_finished_peer(theirs), held_out)
        for name in found:
            found[name].append((mine[name], other[name]))
    rows = []
    for name, pairs in found.items():
        a, b = (statistics.mean(values) for values in zip(*pairs, strict=True))
        worst = max(abs(one - other) for one, other in pairs)
        case = f"{kind} d={d}, {steps} steps of {batch}, {seeds} seeds: held-out {name}"
        ratio = (b / a if name == "dead" else a / b) if a and b else 1.0
        rows.append(Row(case, a, b, "sae-lens fp32", "1", ratio, worst))
    return rows


def _finished(trainer: Trainer) -> Any:
    from pathlib import Path

    from saes.folder import read_weights

    return read_weights(*inference(trainer, 1.0), Path("ours"))


def _finished_peer(trainer: Any) -> Any:
    """What sae-lens would save, read by our loader."""
    from pathlib import Path

    from saes.folder import read_weights

    sae = trainer.sae
    weights = sae.state_dict()
    sae.process_state_dict_for_saving_inference(weights)
    cfg = sae.cfg.get_inference_sae_cfg_dict() | {"rescale_acts_by_decoder_norm": False}
    return read_weights(cfg, {name: tensor.detach() for name, tensor in weights.items()}, Path("theirs"))


if __name__ == "__main__":
    wanted = sys.argv[1]
    for some in {"long": run_long, "peers": run_peers, "quality": run_quality}[wanted]():
        save(f"sae-{wanted}", some, False, RESULTS)
        print(table(f"sae-{wanted}", some), flush=True)
