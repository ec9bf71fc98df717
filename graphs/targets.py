"""What a graph explains: the outputs that `graphs.frozen.freeze` makes readouts of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from mechinterp.errors import UsageError
from mechinterp.types import Placed, Target

__all__ = [
    "Contrast",
    "Feature",
    "Logit",
    "Output",
    "ReportToken",
    "SetContrast",
    "Similarity",
    "TokenLogit",
    "terms_of",
]


@dataclass(frozen=True)
class Contrast:
    """A target against its alternative.

    Generative model: logit of the answer `yes` minus that of `no`. Dual encoder: scaled cosine with the positive
    caption minus that with the negative one. Classifier: logit of the class,
    minus that of the class called `negative` where one is given. All of them are what `HookedVLM.score` gives.
    """

    target: Target


@dataclass(frozen=True)
class Similarity:
    """Scaled cosine of the image with `target.positive` alone (dual encoders), logit bias included."""

    target: Target


@dataclass(frozen=True)
class SetContrast:
    """A target's caption against the mean of a set of captions (dual encoders).

    The set is `target.positive` and every caption of `against`, each counted once; `target.negative` plays no part.
    With `t_j` the embedding of caption `j`, `u_j = t_j / |t_j|`, and the image's `f`, the value is
    `exp(logit_scale) f / |f| . (u_k - mean_j u_j)`: the target's scaled cosine less the mean of the scaled cosines of
    the whole set, itself included. Each embedding is normalised by itself, and their mean is not normalised again. A
    logit bias falls out. The mean over the set that is taken off is what all its captions share.

    Raises UsageError where the set has fewer than two captions, or an empty one.
    """

    target: Target
    against: tuple[str, ...]

    def __post_init__(self) -> None:
        if not all(caption.strip() for caption in self.captions):
            raise UsageError(
                "an empty caption", where="SetContrast.against", hint="captions, such as a list of findings"
            )
        if len(self.captions) < 2:
            raise UsageError("a set of one caption has no contrast", where="SetContrast.against", hint="name another")

    @property
    def captions(self) -> tuple[str, ...]:
        """The set, the target's caption first."""
        return tuple(dict.fromkeys((self.target.positive, *self.against)))


@dataclass(frozen=True)
class Logit:
    """One logit of a target: its class (classifier), or its answer `yes` after the prompt (generative model).

    `demeaned`: minus the mean over all classes or the whole vocabulary.
    """

    target: Target
    demeaned: bool = False


@dataclass(frozen=True)
class TokenLogit:
    """The logit of a token (its text or id) at a position of the prompt that the batch holds (language models).

    `versus` is a token whose logit is taken off; without it and if `demeaned`, the mean over the vocabulary is.
    """

    token: str | int
    position: int = -1
    versus: str | int | None = None
    demeaned: bool = False


@dataclass(frozen=True)
class ReportToken:
    """The logit of token `index` of a report, at the position that predicts it (generative models).

    `tokens` are the ids of the report; without them the model's greedy report is taken (`graphs.frozen.report_of`).
    `prompt` asks for the report (None: the batch's prompt, or where it has none the model's own report prompt).
    `versus` is a token whose logit is taken off; without it and if `demeaned`, the mean over the vocabulary is.
    """

    index: int
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    versus: str | int | None = None
    demeaned: bool = True


@dataclass(frozen=True)
class Feature:
    """The pre-activation of feature `index` of a dictionary at a position: any feature can be explained.

    `placed` stands at block `layer` of `tower`; a transcoder reads `ln2.hook_normalized`, an SAE a residual point.
    """

    tower: str
    layer: int
    pos: int
    index: int
    placed: Placed


Output = Contrast | Similarity | SetContrast | Logit | TokenLogit | ReportToken | Feature


def terms_of(output: Contrast | Similarity | SetContrast) -> tuple[tuple[float, str], ...]:
    """The captions of a dual encoder's output, each with the factor of its scaled cosine; the target's comes first.

    Raises UsageError for a contrast without a negative caption.
    """
    target = output.target
    match output:
        case Similarity():
            return ((1.0, target.positive),)
        case Contrast():
            if target.negative is None:
                raise UsageError(f"target {target.name!r} has no negative caption", hint="explain its Similarity")
            return (1.0, target.positive), (-1.0, target.negative)
        case SetContrast(captions=captions):
            share = 1 / len(captions)
            return (1.0 - share, captions[0]), *((-share, caption) for caption in captions[1:])
        case _:
            assert_never(output)
