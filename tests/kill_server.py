"""Kill extraction and training with SIGKILL at random moments, resume, and compare bytes. Prints JSON.

    python tests/kill_server.py FOLDER KILLS SEED

One process pays for the imports once; every run is a fork of it. One thread, so that forking is safe.
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

import sae_lens
import torch
from store_fakes import RESID, FakeData, FakeModel, hashes

import mechinterp.activations.layout as layout
from mechinterp.activations import ActivationStore, extract
from saes import BatchTopKConfig, train_sae
from saes.checkpoint import CHECKPOINT, read_state


def extraction(out: Path) -> None:
    extract(FakeModel(delay=0.005), FakeData(300), [RESID[0], RESID[2]], out, tokens="all", batch_size=5)


def training(out: Path) -> None:
    store = ActivationStore(out.parent / "store")
    config = BatchTopKConfig(k=4, width=64, epochs=7, batch_size=128, checkpoint_every=17, dead_after=20)
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


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    assert sae_lens  # imported once, here
    layout.SHARD_BYTES = 2**15
    chance, report = random.Random(seed), {}
    for job, out in ((extraction, folder / "store"), (training, folder / "sae")):
        start = time.perf_counter()
        assert ended(forked(job, out)) == 0
        seconds = time.perf_counter() - start
        whole = hashes(out)
        report[job.__name__] = {
            "seconds": seconds,
            "files": sorted(whole),
            "trials": [trial(job, folder, whole, partial(moment, chance, seconds)) for _ in range(kills)],
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
