"""One latent, one factor? DCI, MIG, and RAVEL's cause and isolation on interchange interventions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from scipy.special import xlogy
from torch import Tensor

__all__ = ["Dci", "Ravel", "dci", "interchange", "mig", "mutual_information", "probe_importance", "ravel"]


@dataclass(frozen=True)
class Dci:
    """Disentanglement (one factor a latent) and completeness (one latent a factor), 0 to 1; nan without mass."""

    disentanglement: float
    completeness: float
    per_latent: Float[np.ndarray, " latent"]
    per_concept: Float[np.ndarray, " concept"]


def dci(importance: Float[np.ndarray, "latent concept"]) -> Dci:
    """`D_j = 1 - H(R_j. / sum) / log A`, `C_a = 1 - H(R_.a / sum) / log J` (Eastwood and Williams 2018).

    D is the mean over latents weighted by row sum, C the plain mean over concepts; a row or column without mass is
    nan and does not count. Informativeness, the third part, is the skill of the probe that gave the importances:
    report it beside these, as a random dictionary can be "disentangled".

    Args:
        importance: non-negative, such as `mutual_information` or `probe_importance`.
    """
    r = np.asarray(importance, np.float64)
    rows, columns = _one_minus_entropy(r), _one_minus_entropy(r.T)
    weight = r.sum(1)
    total = weight.sum()
    d = float((np.nan_to_num(rows) * weight).sum() / total) if total > 0 else float("nan")
    c = float(np.nanmean(columns)) if np.isfinite(columns).any() else float("nan")
    return Dci(d, c, rows, columns)


def _one_minus_entropy(r: Float[np.ndarray, "row column"]) -> Float[np.ndarray, " row"]:
    mass = r.sum(1, keepdims=True)
    p = np.divide(r, mass, out=np.full(r.shape, np.nan), where=mass > 0)
    if r.shape[1] < 2:
        return np.where(mass[:, 0] > 0, 1.0, np.nan)
    return 1 + xlogy(p, p).sum(1) / np.log(r.shape[1])


def mutual_information(
    acts: Float[np.ndarray, "image latent"], labels: Shaped[np.ndarray, "image concept"], bins: int = 20
) -> Float[np.ndarray, "latent concept"]:
    """`I(z_j; y_a)` in nats, each latent cut into `bins` bins of equal width (Locatello et al., arXiv:1811.12359).

    A plug-in estimate: it is biased upwards by about (bins - 1)(classes - 1) / 2N, so compare with the same number of
    images and bins only. Labels are classes (any values).
    """
    acts = np.asarray(acts, np.float64)
    low, high = acts.min(0), acts.max(0)
    scaled = (acts - low) / np.where(high > low, high - low, 1.0)
    codes = np.minimum((scaled * bins).astype(np.int64), bins - 1)
    out = np.zeros((acts.shape[1], labels.shape[1]))
    for a, column in enumerate(labels.T):
        _, y = np.unique(column, return_inverse=True)
        classes = np.eye(y.max() + 1)[y]
        joint = np.stack([(codes == b).T.astype(np.float64) @ classes for b in range(bins)], 1) / len(y)
        marginal = joint.sum((1, 2), keepdims=True)  # 1
        independent = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True) / marginal
        ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
        out[:, a] = np.maximum(xlogy(joint, ratio).sum((1, 2)), 0.0)
    return out


def mig(
    acts: Float[np.ndarray, "image latent"], labels: Shaped[np.ndarray, "image concept"], bins: int = 20
) -> Float[np.ndarray, " concept"]:
    """`MIG_a = (I_(1) - I_(2)) / H(y_a)`: gap of the two best latents (arXiv:1802.04942, equation 6).

    nan for a label that never varies. Its mean is the published score.
    """
    information = np.sort(mutual_information(acts, labels, bins), axis=0)
    second = information[-2] if len(information) > 1 else np.zeros(labels.shape[1])
    out = np.full(labels.shape[1], np.nan)
    for a, column in enumerate(labels.T):
        p = np.unique(column, return_counts=True)[1] / len(column)
        entropy = -xlogy(p, p).sum()
        if entropy > 0:
            out[a] = (information[-1, a] - second[a]) / entropy
    return out


def probe_importance(
    acts: Float[np.ndarray, "image latent"], labels: Shaped[np.ndarray, "image concept"], strength: float = 0.1
) -> Float[np.ndarray, "latent concept"]:
    """`R_ja = |w_ja|` of an L1 logistic probe of concept a on standardised latents (DCI with a linear probe)."""
    from sklearn.linear_model import LogisticRegression

    z = np.asarray(acts, np.float64)
    z = (z - z.mean(0)) / np.maximum(z.std(0), 1e-12)
    out = np.zeros((z.shape[1], labels.shape[1]))
    for a, column in enumerate(labels.T):
        if len(np.unique(column > 0.5)) == 2:
            probe = LogisticRegression(C=strength, l1_ratio=1.0, solver="liblinear", random_state=0)
            out[:, a] = np.abs(probe.fit(z, column > 0.5).coef_[0])
    return out


def interchange(
    x: Float[Tensor, "*row d"],
    base: Float[Tensor, "*row latent"],
    source: Float[Tensor, "*row latent"],
    W_dec: Float[Tensor, "latent d"],
    latents: Sequence[int],
) -> Float[Tensor, "*row d"]:
    """`x + sum_{j in latents} (z_j(source) - z_j(base)) D_j`: the source's values of some latents, all else kept.

    What the dictionary did not explain of x stays (RAVEL, arXiv:2402.17700, with the error kept).
    """
    chosen = list(latents)
    return x + (source[..., chosen] - base[..., chosen]) @ W_dec[chosen]


@dataclass(frozen=True)
class Ravel:
    """`cause`: the target attribute became the source's. `isolation`: the others stayed the base's."""

    cause: float
    isolation: float

    @property
    def disentangle(self) -> float:
        """`(cause + isolation) / 2`; 0.5 for an intervention that does nothing, or everything."""
        return (self.cause + self.isolation) / 2


def ravel(
    after: Shaped[np.ndarray, "pair attribute"],
    base: Shaped[np.ndarray, "pair attribute"],
    source: Shaped[np.ndarray, "pair attribute"],
    target: int,
) -> Ravel:
    """Cause and isolation of interchange interventions (RAVEL, arXiv:2402.17700).

    Args:
        after: what the model says of every attribute after the source's latents were put into the base.
        base: the base's attributes; source: the source's. Pairs that agree on the target do not count for cause;
            for isolation an attribute counts on the pairs that disagree on it, as only there a change can show.
        target: column that was to change.
    """
    differ = base != source
    moved = differ[:, target]
    cause = float((after == source)[moved, target].mean()) if moved.any() else float("nan")
    others = differ.copy()
    others[:, target] = False
    isolation = float((after == base)[others].mean()) if others.any() else float("nan")
    return Ravel(cause, isolation)
