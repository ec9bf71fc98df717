"""Do our scores of maps agree with Quantus on random cases?

    python -m benchmarks.peers.agree PEER_PYTHON          (benchmarks/peers/quantus.txt says how to make it)

Prints, for each score, the greatest difference over 64 random maps of a small network and a value of both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from mechinterp.explain.ask import about_function
from mechinterp.metrics.faithfulness import Removals, faithfulness_correlation, insertion_deletion
from mechinterp.metrics.localisation import localise
from mechinterp.metrics.sanity import SIMILARITIES

CASES, SIDE, RUNS, SIZE = 64, 12, 100, 20


def cases(seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs, maps (no two values alike), masks, a network, and the sets that are removed."""
    rng = np.random.default_rng(seed)
    shape, count = (CASES, 1, SIDE, SIDE), SIDE * SIDE
    masks = (rng.random(shape) < rng.uniform(0.05, 0.4, (CASES, 1, 1, 1))).astype(np.float64)
    masks[:, 0, 0, 0] = 1
    subsets = np.stack([[rng.choice(count, SIZE, replace=False) for _ in range(CASES)] for _ in range(RUNS)])
    return {
        "x": rng.standard_normal(shape) + 0.5,
        "maps": rng.standard_normal(shape) + masks,
        "maps_b": rng.standard_normal(shape) + masks,
        "masks": masks,
        "w1": rng.standard_normal((count, 16)) / count**0.5,
        "w2": rng.standard_normal((16, 2)),
        "subsets": subsets,
    }


def ours(c: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same scores, by this package."""
    w1, w2 = torch.from_numpy(c["w1"]), torch.from_numpy(c["w2"])

    def f(x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ w1) @ w2)[:, 0]

    count = SIDE * SIDE
    x = torch.from_numpy(c["x"].reshape(CASES, count))
    question = about_function(f, x, torch.zeros(count, dtype=torch.float64), torch.arange(count))
    maps, inside = c["maps"].reshape(CASES, count), c["masks"].reshape(CASES, count)
    found = {"pixel_flipping": insertion_deletion(question, torch.from_numpy(maps)).deletion[:, 1:].mean(1)}
    correlations = []
    for i in range(CASES):  # Quantus removes other sets from each row, we the same from all
        removed = np.zeros((RUNS, count), bool)
        np.put_along_axis(removed, c["subsets"][:, i], True, 1)
        one = question[i : i + 1]
        drop = (one.score()[:, None] - one.shared(torch.from_numpy(~removed))).numpy()
        correlations.append(faithfulness_correlation(torch.from_numpy(maps[i : i + 1]), Removals(removed, drop)).value)
    found["faithfulness_correlation"] = np.concatenate(correlations)
    located = localise(maps, inside)
    found |= {name: located[name].score.value for name in ("pointing_game", "top_k")}
    found["mass"] = located["mass_ratio"].score.value * inside.mean(1)
    for name in ("spearman", "ssim"):
        found[name] = SIMILARITIES[name](c["maps"][:, 0], c["maps_b"][:, 0])
    return found


def main() -> None:
    made = cases()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.safetensors"
        save_file(made, path)
        script = Path(__file__).with_name("run_quantus.py")
        done = subprocess.run([sys.argv[1], str(script), str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    theirs = json.loads(done.stdout.splitlines()[-1])
    print(f"| score | ours, mean of {CASES} | Quantus | greatest difference |\n| --- | --- | --- | --- |")
    for name, mine in ours(made).items():
        peer = np.asarray(theirs[name])
        print(f"| {name} | {mine.mean():.6f} | {peer.mean():.6f} | {np.abs(mine - peer).max():.1e} |")


if __name__ == "__main__":
    main()
