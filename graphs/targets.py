"""What a graph explains: the outputs that `graphs.frozen.freeze` makes readouts of."""

from __future__ import annotations

from dataclasses import dataclass

from mechinterp.types import Placed, Target

__all__ = ["Contrast", "Feature", "Logit", "Output", "ReportToken", "Similarity", "TokenLogit"]


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


Output = Contrast | Similarity | Logit | TokenLogit | ReportToken | Feature
