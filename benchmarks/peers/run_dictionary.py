"""A trainer of another package, one step a line of standard input. Run by the interpreter of an environment of its own.

    PYTHON run_dictionary.py BATCHES.safetensors PACKAGE KIND --k 32 --width 2048 --threads 1

PACKAGE is dictionary_learning (kinds topk, batchtopk, matryoshka) or sparsify (topk). Prints a line of JSON when ready
(after a first step), then one for each line that it reads: wall and CPU seconds of the step, and the loss.

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


def dictionary_learning(kind: str, x: torch.Tensor, k: int, width: int) -> Callable[[torch.Tensor], float]:
    """A step of dictionary_learning's trainer."""
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    shape: dict[str, Any] = {"steps": STEPS, "activation_dim": x.shape[1], "dict_size": width, "k": k}
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

    return step


def sparsify(kind: str, x: torch.Tensor, k: int, width: int) -> Callable[[torch.Tensor], float]:
    """A step as sparsify's trainer makes it."""
    from sparsify import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    if kind != "topk":
        raise SystemExit(f"sparsify does not train {kind}")
    sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=width, k=k))
    sae.b_dec.data = x.mean(0)
    adam = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)

    def step(batch: torch.Tensor) -> float:
        sae.set_decoder_norm_to_unit_norm()
        found = sae(x=batch, y=batch, dead_mask=None)
        (found.fvu + found.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        return float(found.fvu.detach())

    return step


def main() -> None:
    """Serve steps until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batches")
    parser.add_argument("package", choices=["dictionary_learning", "sparsify"])
    parser.add_argument("kind")
    for name in ("k", "width", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    batches = list(load_file(chosen.batches).values())
    out, sys.stdout = sys.stdout, sys.stderr  # what they print is not our answer
    make = {"dictionary_learning": dictionary_learning, "sparsify": sparsify}[chosen.package]
    step = make(chosen.kind, batches[0], chosen.k, chosen.width)
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
