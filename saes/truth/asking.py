"""Many questions to a generative model in one pass: they share the image, so the image is read once.

The language model reads `image tokens, question` from left to right, so the image tokens do not see the question. All
questions are laid one after another behind one copy of the image; a mask lets each see the image and itself, and every
question starts at the position at which it would stand alone. Equal (to rounding) to one pass a question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.models.heads import image_features, readout
from mechinterp.models.prompts import answer_token, image_mask
from mechinterp.models.tables import Generative
from mechinterp.types import ImageTextBatch, Site, Target

__all__ = ["Questions", "generative", "questions_of", "resumer"]

Resume = Callable[[Float[Tensor, "batch pos d"]], Float[Tensor, "batch target"]]


def generative(model: HookedVLM) -> bool:
    """Whether the model answers questions, rather than comparing an image with texts."""
    return isinstance(model.table.head, Generative)


@dataclass(frozen=True, eq=False)
class Questions:
    """The packed prompt of several targets.

    Fields:
        ids: `[token]`, the shared start of all prompts (image tokens included), then the rest of each.
        positions: `[token]`, where each stands in its own prompt.
        sees: `[token, token]`, whether the row's token sees the column's.
        ends: the last token of each question.
        yes, no: the tokens whose logits are compared.
    """

    ids: Int[Tensor, " token"]
    positions: Int[Tensor, " token"]
    sees: Bool[Tensor, "token token"]
    ends: Int[Tensor, " target"]
    yes: Int[Tensor, " target"]
    no: Int[Tensor, " target"]

    @classmethod
    def of(cls, model: HookedVLM, targets: Sequence[Target]) -> Questions:
        """Pack the targets' questions. Raises UsageError where the prompts do not share their start up to the image."""
        batches = [model.preprocess(_blank(model), [target.asked()]) for target in targets]
        prompts = [batch.input_ids[0] for batch in batches if batch.input_ids is not None]
        least = min(len(p) for p in prompts)
        same = torch.stack([p[:least] == prompts[0][:least] for p in prompts]).all(0)
        shared = least if bool(same.all()) else int(same.long().argmin())
        shared = min(shared, least - 1)  # each question keeps a token of its own, to read the answer at
        image = image_mask(model.hf, prompts[0][None])[0]
        if not bool(image[:shared].sum() == image.sum()):
            raise UsageError("the questions come before the image", where=model.label, hint="ask one at a time")
        tails = [p[shared:] for p in prompts]
        part = torch.cat([torch.full((shared,), -1), *(torch.full((len(t),), i) for i, t in enumerate(tails))])
        positions = torch.cat([torch.arange(shared), *(torch.arange(shared, shared + len(t)) for t in tails)])
        order = torch.arange(len(part))
        sees = ((part[None] == -1) | (part[None] == part[:, None])) & (order[None] <= order[:, None])
        ends = shared + torch.tensor([len(t) for t in tails]).cumsum(0) - 1
        yes, no = (
            torch.tensor([answer_token(model.tokenizer, a, b) for a, b in pairs])
            for pairs in ([(t.yes, t.no) for t in targets], [(t.no, t.yes) for t in targets])
        )
        return cls(torch.cat([prompts[0][:shared], *tails]), positions, sees, ends, yes, no)

    def scores(self, model: HookedVLM, features: Float[Tensor, "batch image d"]) -> Float[Tensor, "batch target"]:
        """Logit of yes minus logit of no after each question, given what the projector made of the images."""
        rows, hf = len(features), model.hf
        embeds = hf.get_input_embeddings()(self.ids)[None].expand(rows, -1, -1).clone()
        image = image_mask(hf, self.ids[None])[0]
        embeds[:, image] = features.to(embeds.dtype)
        mask = torch.zeros(self.sees.shape, dtype=embeds.dtype).masked_fill(~self.sees, torch.finfo(embeds.dtype).min)
        hidden = hf.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask[None, None].expand(rows, 1, -1, -1),
            position_ids=self.positions[None],
            use_cache=False,
        ).last_hidden_state[:, self.ends]
        head = hf.lm_head.weight
        return torch.einsum("btd,td->bt", hidden, head[self.yes] - head[self.no])


def questions_of(model: HookedVLM, targets: Sequence[Target]) -> Callable[[ImageTextBatch], Tensor]:
    """A generative model's scores `[batch, target]` of all questions, from the pixels of a batch."""
    asked = Questions.of(model, targets)

    def scores(batch: ImageTextBatch) -> Float[Tensor, "batch target"]:
        with model.attached():
            return asked.scores(model, image_features(model.hf, model.table, batch.pixel_values))

    return scores


def resumer(model: HookedVLM, site: Site, targets: Sequence[Target]) -> Resume:
    """A function from values after a block of the vision tower to scores on all targets; it runs only what comes after.

    Raises UsageError for a site that is not the residual stream after a block of the vision tower.
    """
    if site.tower != "vision" or site.layer is None or site.point != "hook_resid_post":
        raise UsageError("is not the residual stream after a vision block", where=str(site))
    if not generative(model):
        blank = model.preprocess(_blank(model))

        def scores(value: Tensor) -> Tensor:
            rows = ImageTextBatch(blank.pixel_values.expand(len(value), -1, -1, -1))
            return model.run_from(str(site), value, rows, targets)

        return scores
    asked, later = Questions.of(model, targets), model.blocks("vision")[site.layer + 1 :]

    def answers(value: Tensor) -> Tensor:
        with model.attached():
            for block in later:
                value = block(value, attention_mask=None)
            return asked.scores(model, readout(model.hf, model.table, value))

    return answers


def _blank(model: HookedVLM) -> Tensor:
    """One black image."""
    height, width = (side * 16 for side in model.grid_shape)
    return torch.zeros(1, height, width)
