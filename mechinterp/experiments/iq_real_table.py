"""iq-real-table: the injected column on a real table (breast cancer, Wisconsin, 569 rows of 30 columns).

1. Columns are standardised on training rows; a 31st column of normal noise is the slot. Networks (several seeds, each
   with its own split and noise) learn malignant against benign; their logit is explained.
2. At test time the slot follows the logit: psi * z + noise. R, F, IS and companions, before and after, at each psi.
3. The same explainers under RBP, an exaggerated RBP, and bounds. With 31 columns exact Shapley values are out of reach,
   so KernelSHAP stands for them.

The table ships with scikit-learn (sklearn.datasets.load_breast_cancer; Street, Wolberg and Mangasarian 1993). A patient
is a row. About 2.5 minutes on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from mechinterp.experiments.iq_judges import left_out_note
from mechinterp.experiments.iq_page import Layout, injection_result
from mechinterp.experiments.iq_rows import CONTROL, Network, label_of, rows_study, train
from mechinterp.experiments.result import Result
from mechinterp.explain.tabular import EXPLAINERS, kernel_shap
from mechinterp.explain.tabular_questions import about_rows
from mechinterp.metrics.iq import expected_absolute_r
from mechinterp.metrics.statistics import auroc
from mechinterp.progress import progress

__all__ = ["Sizes", "network_of", "run"]

ANCHORS = ("random", "constant", "echo")
DECAY = 1e-2  # 400 rows of 31 columns: without it the logits of a separable table grow without bound
COPIES = 6  # of every training row


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    rows: int = 30
    seeds: int = 8
    draws: int = 30
    steps: int = 300
    psi: tuple[float, ...] = (0.0, 0.5, 0.8)


QUICK = Sizes(rows=5, seeds=1, draws=3, steps=60, psi=(0.0, 0.8))


def network_of(seed: int, steps: int, rows: int) -> Network:
    """A network that learnt the table and a column of noise; its skill is AUROC on the rows of the other third."""
    from sklearn.datasets import load_breast_cancer

    values, benign = (np.asarray(one, np.float64) for one in load_breast_cancer(return_X_y=True))
    label = 1.0 - benign  # 1: malignant
    rng = np.random.default_rng(20_000 + seed)
    order = rng.permutation(len(label))
    fit, rest = order[: 2 * len(label) // 3], order[2 * len(label) // 3 :]
    scaled = (values - values[fit].mean(0)) / values[fit].std(0)
    x = torch.from_numpy(np.concatenate([scaled, rng.normal(size=(len(label), 1))], axis=1))
    # every training row comes several times with fresh noise: one draw each would be informative by chance
    noisy = torch.cat([x[fit]] * COPIES)
    noisy[:, -1] = torch.from_numpy(rng.normal(size=len(noisy)))
    net = train(noisy, torch.from_numpy(label[fit]).repeat(COPIES), seed, steps, binary=True, decay=DECAY)
    with torch.no_grad():
        fitted, out = net(x[fit])[:, 0], net(x[rest])[:, 0]
    return Network(
        lambda some: net(some)[:, 0],
        values.shape[1],
        auroc(out.numpy(), label[rest]),
        torch.zeros(x.shape[1], dtype=x.dtype),
        x[rest][:rows],
        x[fit],
        float(fitted.mean()),
        float(fitted.std()),
    )


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    size = sizes or (QUICK if quick else Sizes())
    networks = [
        network_of(seed * 100 + s, size.steps, size.rows)
        for s in progress(range(size.seeds), "networks", unit="network")
    ]
    explainers = {n: e for n, e in EXPLAINERS.items() if n != "shapley"}
    explainers["kernel_shap"] = partial(kernel_shap, samples=96)
    study = rows_study(networks, explainers, size.psi, size.draws, seed)
    line = tuple((label_of(p), p) for p in size.psi)
    real = tuple(n for n in explainers if n not in ANCHORS)
    layout = Layout(line[0][0], line[-1][0], line, real, ANCHORS, "the injected column", ("occlusion",), (), CONTROL)
    skills = [n.skill for n in networks]
    notes = [
        f"AUROC of the networks on rows not trained on: {min(skills):.3f} to {max(skills):.3f} over {len(skills)} "
        "seeds. What is explained is the logit of malignant; an explanation is of the network, not of a patient.",
        f"R by chance with {size.draws} draws: {expected_absolute_r(size.draws):.3f}.",
        "F is scored by removing a column to its value in a training row ('by ones': to one sd above the mean); "
        "explainers remove it to the mean. occlusion removes single columns as F does, though to another value, so no "
        "claim about F counts it.",
    ]
    notes.append(left_out_note([(about_rows(n.f, n.test, n.reference), n.sd) for n in networks], seed))
    return injection_result(study, layout, notes)
