"""Our training step against sae-lens's SAETrainer: same start, same batches, same schedule, fp32 and autocast.

Speed is measured step by step in turns; quality on held-out rows after a training of both (the same number of steps,
several seeds). The data are sums of features that fire in a hierarchy and with a skewed frequency, in superposition.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, Row, interleaved, save, table
from saes.config import BatchTopKConfig, MatryoshkaConfig, TopKConfig, TrainConfig
from saes.engine.inference import inference
from saes.engine.trainer import Trainer

NAME = "sae"

SIZES, K, BATCH, EXPANSION = (128, 256, 768), 32, 4096, 16
KINDS = {"topk": TopKConfig, "batchtopk": BatchTopKConfig, "matryoshka": MatryoshkaConfig}
LEARNING_RATE = 1e-3


def run(quick: bool = False) -> list[Row]:
    """Speed at each size and kind, quality at the sizes that train in minutes, share of the matrix peak."""
    sizes, repeats = ((128,), 2) if quick else (SIZES, 3)
    rows = []
    for d in sizes:
        batches = [next(stream) for stream in [structured(d, seed=0)] for _ in range(3)]
        peak = _peak(d)
        for kind in KINDS:
            rows += _speed(kind, d, batches, repeats, peak)
    for kind in KINDS:
        rows += _quality(kind, 128, 30 if quick else 60, seeds=1 if quick else 3)
    return rows


def run_long() -> list[Row]:
    """Quality of longer runs, which takes the peer about an hour: `python -m benchmarks.bench_sae`."""
    return [row for d, steps in ((128, 400), (256, 200)) for kind in KINDS for row in _quality(kind, d, steps, seeds=3)]


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


def _config(kind: str, d: int) -> TrainConfig:
    return KINDS[kind](k=K, width=EXPANSION * d, batch_size=BATCH, lr=LEARNING_RATE, dead_after=100)


def _peer(kind: str, d: int, ours: Trainer, steps: int, autocast: bool) -> Any:
    """sae-lens's trainer with our initial weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer
    shape: dict[str, Any] = {"d_in": d, "d_sae": EXPANSION * d, "k": K}
    match kind:
        case "topk":
            sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**shape))
        case "batchtopk":
            shape["topk_threshold_lr"] = ours._threshold_rate()
            sae = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**shape))
        case _:
            shape |= {"topk_threshold_lr": ours._threshold_rate(), "matryoshka_widths": list(ours.config.levels)}
            sae = sae_lens.MatryoshkaBatchTopKTrainingSAE(sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(**shape))
    with torch.no_grad():
        sae.W_dec.copy_(ours.weights["W_dec"])
        sae.W_enc.copy_(ours.weights["enc"].T)
        sae.b_dec.copy_(ours.weights["b_dec"])
    settings = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,
        lr_warm_up_steps=steps // 20 if steps // 20 > 1 else 0,
        lr_decay_steps=steps // 5,
        dead_feature_window=100,
        autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(settings, sae, iter(()))


def _stepper(trainer: Any, batches: list[Tensor]) -> Callable[[], None]:
    """One training step a call, on the batches in turn."""
    state = {"step": 0}

    def step() -> None:
        trainer.step(batches[state["step"] % len(batches)])
        if hasattr(trainer, "n_training_steps"):
            trainer.n_training_steps += 1
        state["step"] += 1

    return step


def _speed(kind: str, d: int, batches: list[Tensor], repeats: int, peak: float) -> list[Row]:
    """Rows per second of ours and of the fastest mode of theirs."""
    ours = Trainer(_config(kind, d), d, batches[0].mean(0), 1000)
    modes = {"fp32": False} | ({"autocast": True} if _bf16_is_fast() else {})
    runs = {name: _stepper(_peer(kind, d, ours, 1000, cast), batches) for name, cast in modes.items()}
    runs = {"ours": _stepper(ours, batches), **runs}
    for step in runs.values():
        step()  # warms up
    times = interleaved(runs, repeats)
    mine = times.pop("ours")
    mode = min(times, key=lambda name: times[name])
    case = f"{kind} d={d}, {EXPANSION * d} latents, k={K}, batch {BATCH}, {torch.get_num_threads()} threads"
    share = 2 * BATCH * d * EXPANSION * d / mine / peak
    return [
        Row(case, BATCH / mine, BATCH / times[mode], f"sae-lens {mode}", "rows/s", times[mode] / mine, None),
        Row(f"{case}: share of peak", share, 1.0, f"one product at {peak / 1e9:.0f} GFLOP/s", "1", share, None),
    ]


def _bf16_is_fast() -> bool:
    """Whether bf16 products are at least half as fast as fp32 ones; where they are emulated, autocast is no rival."""
    x = torch.randn(512, 512)
    seconds = interleaved({str(y.dtype): lambda y=y: y @ y for y in (x, x.bfloat16())}, 5)
    return seconds["torch.bfloat16"] < 2 * seconds["torch.float32"]


def _peak(d: int) -> float:
    """FLOP/s of the dense encoder product alone, fp32, the best of some."""
    x, W = torch.randn(BATCH, d), torch.randn(d, EXPANSION * d)
    out = torch.empty(BATCH, EXPANSION * d)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(x, W, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * BATCH * d * EXPANSION * d / best


@torch.no_grad()
def _scores(dictionary: Any, x: Tensor) -> dict[str, float]:
    from saes.metrics import dead, l0, r2

    acts = dictionary.encode(x)
    return {"R2": r2(x, dictionary.decode(acts)), "L0": l0(acts), "dead": dead(acts)}


def _quality(kind: str, d: int, steps: int, seeds: int) -> list[Row]:
    """Held-out R2, L0 and dead latents of both after the same training."""
    found: dict[str, list[tuple[float, float]]] = {"R2": [], "L0": [], "dead": []}
    held_out = torch.cat([next(structured(d, seed=777)) for _ in range(2)])
    for seed in range(seeds):
        stream = structured(d, seed)
        first = next(stream)
        ours = Trainer(_config(kind, d), d, first.mean(0), steps, seed)
        theirs = _peer(kind, d, ours, steps, False)
        for _ in range(steps):
            batch = next(stream)
            ours.step(batch)
            theirs.step(batch)
            theirs.n_training_steps += 1
        mine, other = _scores(_finished(ours), held_out), _scores(_finished_peer(theirs), held_out)
        for name in found:
            found[name].append((mine[name], other[name]))
    rows = []
    for name, pairs in found.items():
        a, b = (statistics.mean(values) for values in zip(*pairs, strict=True))
        worst = max(abs(one - other) for one, other in pairs)
        case = f"{kind} d={d}, {steps} steps, {seeds} seeds: held-out {name}"
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
    long = run_long()
    save("sae-long", long, False, RESULTS)
    print(table("sae-long", long))
