"""Frozen forward passes: `freeze` a model on one input, `check` that the result says what the model computed, `verify`
that everything which is named as held is held.

    from graphs.frozen import check, freeze
    from graphs.targets import Contrast

    frozen = freeze(model, model.prepare(image, [target]), [Contrast(target)])

Nothing is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechinterp.lazy import lazily

if TYPE_CHECKING:
    from graphs.frozen.capture import in_dtype
    from graphs.frozen.freezing import freeze
    from graphs.frozen.generative import report_of
    from graphs.frozen.lens import from_transformer_lens
    from graphs.frozen.parts import FrozenPass
    from graphs.frozen.proof import verify
    from graphs.frozen.residuals import Residual, check, worst

__all__ = [
    "FrozenPass",
    "Residual",
    "check",
    "freeze",
    "from_transformer_lens",
    "in_dtype",
    "report_of",
    "verify",
    "worst",
]

_HOMES = {
    "FrozenPass": "parts",
    "Residual": "residuals",
    "check": "residuals",
    "freeze": "freezing",
    "from_transformer_lens": "lens",
    "in_dtype": "capture",
    "report_of": "generative",
    "verify": "proof",
    "worst": "residuals",
}

__getattr__ = lazily(__name__, _HOMES)
