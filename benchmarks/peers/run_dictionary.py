"""A trainer of another package, one step a line of standard input. Run by the interpreter of an environment of its own.

    PYTHON run_dictionary.py BATCHES.safetensors PACKAGE KIND --k 32 --width 2048 --threads 1 [--train SEED]

PACKAGE is dictionary_learning (kinds topk, batchtopk, matryoshka) or sparsify (topk). Prints a line of JSON when ready
(after a first step), then one for each line that it reads: wall and CPU seconds of the step, and the loss. With --train
it makes one step on each batch but the last instead, warming up and decaying as ours does, and prints R2, L0 and the
share of dead latents on the last (TopK only).

dictionary_learning is stepped by its own `update`. sparsify's trainer holds a language model and its data, so its step
is put together here from its `SparseCoder` and the calls that `Trainer.fit` makes of it, with Adam in place of its sign
descent.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from safetensors.torch import load_file

LEARNING_RATE, STEPS = 1e-3, 10_000
Step = Callable[[torch.Tensor], float]
Codes = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # activations and reconstruction


def dictionary_learning(
    kind: str, x: torch.Tensor, k: int, width: int, steps: int | None, seed: int
) -> tuple[Step, Codes]:
    """A step of dictionary_learning's trainer, and what its dictionary then makes of rows."""
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    shape: dict[str, Any] = {"steps": STEPS, "activation_dim": x.shape[1], "dict_size": width, "k": k, "seed": seed}
    if steps is not None:
        shape |= {"steps": steps, "warmup_steps": steps // 20, "decay_start": steps - steps // 5}
    shape |= {"layer": 0, "lm_name": "none", "lr": LEARNING_RATE, "device": "cpu"}
    if kind == "topk":
        trainer = top_k.TopKTrainer(**shape)
    elif kind == "batchtopk":
        trainer = batch_top_k.BatchTopKTrainer(**shape)
    else:
        trainer = matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(**shape, group_fractions=[1 / 16, 3 / 16, 3 / 4])
    done = 0

    def step(batch: torch.Tensor) -> float:
        nonlocal done
        done += 1
        return float(trainer.update(done - 1, batch))

    def codes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        acts = trainer.ae.encode(rows)
        return acts, trainer.ae.decode(acts)

    return step, codes


def sparsify(kind: str, x: torch.Tensor, k: int, width: int, steps: int | None, seed: int) -> tuple[Step, Codes]:
    """A step as sparsify's trainer makes it, and what its dictionary then makes of rows."""
    from sparsify import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    if kind != "topk":
        raise SystemExit(f"sparsify does not train {kind}")
    torch.manual_seed(seed)
    sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=width, k=k))
    sae.b_dec.data = x.mean(0)
    adam = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    done = 0

    def rate() -> float:
        if steps is None:
            return 1.0
        return min(1.0, (done + 1) / max(1, steps // 20), (steps - done) / max(1, steps // 5))

    def step(batch: torch.Tensor) -> float:
        nonlocal done
        adam.param_groups[0]["lr"] = LEARNING_RATE * rate()
        done += 1
        sae.set_decoder_norm_to_unit_norm()
        found = sae(x=batch, y=batch, dead_mask=None)
        (found.fvu + found.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        return float(found.fvu.detach())

    def codes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = sae.encode(rows)
        acts = torch.zeros(len(rows), width).scatter_(1, found.top_indices, found.top_acts)
        return acts, sae.decode(found.top_acts, found.top_indices)

    return step, codes


@torch.no_grad()
def quality(codes: Codes, x: torch.Tensor) -> dict[str, float]:
    """R2 about the mean of each dimension, active latents of a row, share of latents that are never active."""
    acts, made = codes(x)
    fires = acts > 0
    r2 = 1 - float((x - made).double().square().sum() / (x - x.mean(0)).double().square().sum())
    return {"R2": r2, "L0": float(fires.double().sum(1).mean()), "dead": float((~fires.any(0)).double().mean())}


def main() -> None:
    """Serve steps until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batches")
    parser.add_argument("package", choices=["dictionary_learning", "sparsify"])
    parser.add_argument("kind")
    for name in ("k", "width", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--train", type=int, metavar="SEED")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    batches = list(load_file(chosen.batches).values())
    out, sys.stdout = sys.stdout, sys.stderr  # what they print is not our answer
    make = {"dictionary_learning": dictionary_learning, "sparsify": sparsify}[chosen.package]
    trains = chosen.train is not None
    steps = len(batches) - 1 if trains else None
    step, codes = make(chosen.kind, batches[0], chosen.k, chosen.width, steps, chosen.train or 0)
    if trains:
        for batch in batches[:-1]:
            step(batch)
        print(json.dumps(quality(codes, batches[-1])), file=out, flush=True)
        return
    first = step(batches[0])
    distribution = {"dictionary_learning": "dictionary-learning", "sparsify": "eai-sparsify"}[chosen.package]
    print(json.dumps({"version": version(distribution), "loss": first}), file=out, flush=True)
    for turn, _ in enumerate(sys.stdin, start=1):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step(batches[turn % len(batches)])
        seconds = (time.perf_counter() - wall, time.process_time() - cpu)
        print(json.dumps({"wall": seconds[0], "cpu": seconds[1], "loss": loss}), file=out, flush=True)


if __name__ == "__main__":
    main()
