"""How attention leads from where a score is read to the elements of a Question: patterns of every block on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from mechinterp.explain.ask import patch_owner
from mechinterp.explain.inside import Hook, places_of, reader, seen_inside, source_of
from mechinterp.explain.question import Question, Source
from mechinterp.models import HookedVLM
from mechinterp.models.prompts import image_mask
from mechinterp.models.tables import Dual, Generative

__all__ = ["Path", "Stage", "paths"]

POOL = "vision.pool.hook_pattern"  # our name for the pattern of a pooling head, which has no hook point


@dataclass(frozen=True)
class Stage:
    """Attention of one block, and the gradient of the score with respect to it where that was asked for."""

    pattern: Float[Tensor, "row head query key"]
    gradient: Float[Tensor, "row head query key"] | None


@dataclass(frozen=True)
class Path:
    """From the readout down to the tokens of the elements.

    Args:
        start: weight of every token of the topmost stage in the readout; sums to 1, unless it holds relevance.
        stages: from the top; a matrix `[token above, token below]` where one tower feeds another.
        at: positions of the elements at the bottom.
    """

    start: Float[Tensor, "row token"]
    stages: tuple[Stage | Float[Tensor, "_ _"], ...]
    at: Int[Tensor, " element"]

    def matrices(self, of: Callable[[Stage], Tensor]) -> Iterator[Float[Tensor, "_ _ _"]]:
        """`of` every stage, from the top."""
        for stage in self.stages:
            yield of(stage) if isinstance(stage, Stage) else stage[None]


def paths(question: Question, where: str, gradients: bool) -> list[Path]:
    """One path for each part with elements, rows all at once. Raises UsageError for a question without attention."""
    places, source = places_of(question, where), source_of(question, where)
    model, kept = source.model, dict[str, Tensor]()
    generative = isinstance(model.table.head, Generative)
    towers = sorted({tower for tower, _ in places} | ({"text"} if generative else set()))
    hooks = [hook for tower in towers for hook in _hooks(model, tower, kept, gradients)]
    score = seen_inside(question, hooks, graph=gradients)
    names = [name for name in kept if name.endswith("hook_pattern")]
    found = torch.autograd.grad(score.sum(), [kept[name] for name in names]) if gradients else [None] * len(names)
    stages = {name: Stage(kept[name].detach(), one) for name, one in zip(names, found, strict=True)}
    blocks = {
        tower: tuple(stages[_pattern(tower, layer)] for layer in reversed(range(model.n_layers(tower))))
        for tower in towers
    }
    start = {tower: _start(model, tower, stages, kept) for tower in towers if tower == "text" or not generative}
    walks = []
    for tower, at in places:
        if generative and tower == "vision":
            walks.append(Path(start["text"], (*blocks["text"], _bridge(source), *blocks["vision"]), at))
        else:
            walks.append(Path(start[tower], blocks[tower], at))
    return walks


def _pattern(tower: str, layer: int) -> str:
    return f"{tower}.blocks.{layer}.attn.hook_pattern"


def _hooks(model: HookedVLM, tower: str, kept: dict[str, Tensor], gradients: bool) -> list[Hook]:
    """What keeps the patterns of a tower, and what says where it is read."""
    keep = reader(kept, copied=gradients)
    hooks: list[Hook] = [(_pattern(tower, layer), keep) for layer in range(model.n_layers(tower))]
    if not isinstance(model.table.head, Dual) or (tower == "vision" and model.cls_token is not None):
        return hooks
    ends = f"{tower}.ln_final.hook_normalized", f"{tower}.hook_pooled"
    if tower == "text":
        return [*hooks, *((name, reader(kept)) for name in ends)]

    def pooled(value: Tensor, hook: Any) -> Tensor:
        kept[POOL], output = pooling(model.hf.vision_model.head, kept[ends[0]])
        return output

    return [*hooks, (ends[0], reader(kept)), (ends[1], pooled)]


def pooling(
    head: Any, hidden: Float[Tensor, "row token d"]
) -> tuple[Float[Tensor, "row head 1 token"], Float[Tensor, "row d"]]:
    """SigLIP's attention-pooling head written out: the pattern of its one query, and its output."""
    attention = head.attention
    weight, bias = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (linear(x, w, b) for x, w, b in zip((head.probe, hidden, hidden), weight, bias, strict=True))
    q, k, v = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    pattern = (q @ k.transpose(-1, -2) / sqrt(q.shape[-1])).softmax(-1)
    mixed = attention.out_proj((pattern @ v).transpose(1, 2).flatten(2))[:, 0]
    return pattern, mixed + head.mlp(head.layernorm(mixed))


def _start(
    model: HookedVLM, tower: str, stages: dict[str, Stage], kept: dict[str, Tensor]
) -> Float[Tensor, "row token"]:
    """Weight of the tokens in the readout: all at one token, or the pattern of a pooling head (as TransMM has it)."""
    if tower == "vision" and POOL in stages:
        stage = stages[POOL]
        weight = stage.pattern if stage.gradient is None else (stage.pattern * stage.gradient).clamp(min=0)
        return weight.mean(1)[:, 0]
    some = stages[_pattern(tower, 0)].pattern
    if tower == "vision":
        at = model.cls_token
    elif isinstance(model.table.head, Dual):  # the token whose final value goes into the embedding
        final, pooled = (kept[f"text.{end}"].detach() for end in ("ln_final.hook_normalized", "hook_pooled"))
        at = int((final[0] - pooled[0]).abs().sum(-1).argmin())
    else:
        at = -1
    start = some.new_zeros(len(some), some.shape[-1])
    start[:, at] = 1.0
    return start


def _bridge(source: Source) -> Float[Tensor, "text vision"]:
    """What each token of a generative model's prompt is made of: image tokens of patches, others of nothing."""
    model, ids = source.model, source.batch.input_ids
    assert ids is not None
    tokens = image_mask(model.hf, ids[:1].to(model.hf.device))[0].nonzero()[:, 0]
    patches = model.patch_tokens()
    found = torch.zeros(ids.shape[1], patches.stop, device=tokens.device)
    if model.family == "gemma3":  # means over squares of patches
        side = round(len(tokens) ** 0.5)
        owner = patch_owner(*model.grid_shape, side, side).flatten().to(tokens.device)
        found[tokens[owner], torch.arange(patches.start, patches.stop, device=tokens.device)] = len(tokens) / len(owner)
    else:  # one each, the class token too where it is kept
        found[tokens, torch.arange(patches.stop - len(tokens), patches.stop, device=tokens.device)] = 1.0
    return found
