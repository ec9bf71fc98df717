"""Kill extraction and training with SIGKILL at random moments, resume, and compare bytes. Prints JSON.

    python tests/kill_server.py FOLDER KILLS SEED

`KILLS` of training runs, spread over every kind of dictionary, and two thirds as many of an extraction. One process
pays for the imports once; every run is a fork of it. One thread, so that forking is safe.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pandas
import pyarrow.parquet
import torch
from store_fakes import RESID, FakeData, FakeModel, hashes

import mechinterp.activations.layout as layout
from mechinterp.activations import ActivationStore, extract
from saes.checkpoint import CHECKPOINT, read_state
from saes.config import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    TopKConfig,
    TranscoderConfig,
)
from saes.train import train_sae, train_transcoder

SHORT = {"width": 64, "epochs": 5, "batch_size": 128, "checkpoint_every": 17, "dead_after": 20}
KINDS = [
    TopKConfig(k=4, **SHORT),
    BatchTopKConfig(k=4, **SHORT),
    MatryoshkaConfig(k=4, **SHORT),
    JumpReLUConfig(target_l0=4, **SHORT),
    GatedConfig(**SHORT),
    TranscoderConfig(k=4, skip=True, sparsity="batchtopk", **SHORT),
]


def extraction(out: Path) -> None:
    extract(FakeModel(delay=0.005), FakeData(300), [RESID[0], RESID[2]], out, tokens="all", batch_size=5)


def training(config, out: Path) -> None:
    store = ActivationStore(out.parent / "store")
    if isinstance(config, TranscoderConfig):
        train_transcoder(store, RESID[0], RESID[2], config, out)
    else:
        train_sae(store, RESID[2], config, out)


def forked(job, out: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            job(out)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def trial(job, folder: Path, whole: dict, delay) -> dict:
    """One kill after `delay()` seconds, then a resumed run. A run that ended before its kill is tried again."""
    out, killed = folder / "interrupted", False
    for attempt in range(6):
        shutil.rmtree(out, ignore_errors=True)
        pid = forked(job, out)
        time.sleep(delay() * 0.7**attempt)
        os.kill(pid, signal.SIGKILL)
        killed = ended(pid) == -signal.SIGKILL
        if killed:
            break
    left = len(hashes(out)) if out.exists() else 0
    step = read_state(out / CHECKPOINT)[1]["numbers"]["n_training_steps"] if (out / CHECKPOINT).exists() else 0
    resumed = ended(forked(job, out))
    return {"killed": killed, "left": left, "step": step, "resumed": resumed, "same": hashes(out) == whole}


def moment(chance: random.Random, seconds: float) -> float:
    return chance.uniform(0.02, 0.95) * seconds


def trials(job, out: Path, kills: int, chance: random.Random) -> dict:
    """A whole run, then `kills` interrupted ones."""
    start = time.perf_counter()
    assert ended(forked(job, out)) == 0
    seconds, whole = time.perf_counter() - start, hashes(out)
    return {
        "seconds": seconds,
        "files": sorted(whole),
        "trials": [trial(job, out.parent, whole, partial(moment, chance, seconds)) for _ in range(kills)],
    }


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    assert pandas and pyarrow.parquet  # imported once, here: what a run would import late
    layout.SHARD_BYTES = 2**15
    chance = random.Random(seed)
    report = {"extraction": trials(extraction, folder / "store", kills * 2 // 3, chance)}
    for number, config in enumerate(KINDS):
        share = kills // len(KINDS) + (number < kills % len(KINDS))
        report[config.kind] = trials(partial(training, config), folder / config.kind, share, chance)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
