"""What a graph names as held is exactly what it holds: hold it in the live model, and autograd gives the graph's edges.

Nothing of the frozen parts is used here. Hook points are detached where the model runs them; what has no hook point is
held by another forward of its own module, written out below. One name less, and the gradient is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from test_graphs_frozen_lens import KINDS, MORE, TOKENS, lens
from test_graphs_frozen_models import DOUBLE, TARGET, batch_of, model_of
from torch import Tensor

from graphs.build import build_graph
from graphs.frozen import freeze, from_transformer_lens
from graphs.graph import AttributionGraph
from graphs.targets import Contrast, TokenLogit
from mechinterp.models import HookedVLM
from mechinterp.types import Target

FAMILIES = ("clip", "siglip", "vit", "llava", "gemma3")
Rows = dict[tuple[str, str], Tensor]
"""Edges by output and kind of input ("vision.patch", "text.0.tok"), one a position in order."""

# ------------------------------------------------------------------------------------------------- holding, by name


def held_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """LayerNorm with its bias, or Gemma's RMSNorm, the root of the (centred) mean square a constant."""

    def forward(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if hasattr(norm, "bias") else x
        scale = (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt().detach()
        return centred / scale * norm.weight + norm.bias if hasattr(norm, "bias") else x / scale * (1 + norm.weight)

    return forward


def held_gate(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An activation as a multiple of its input, the factor a constant."""
    return lambda z: z * (act(z) / z).detach()


def held_pooling(head: Any) -> Callable[[Tensor], Tensor]:
    """SigLIP's head: keys a constant, so that the pattern is; its norm's scale and its gate as well."""
    norm, gate = held_norm(head.layernorm), held_gate(head.mlp.activation_fn.forward)

    def forward(x: Tensor) -> Tensor:
        pooled = head.attention(head.probe.expand(len(x), -1, -1), x.detach(), x)[0]
        return (pooled + head.mlp.fc2(gate(head.mlp.fc1(norm(pooled)))))[:, 0]

    return forward


IN_WORDS: dict[str, tuple[str, Callable[[Any], Callable]]] = {
    "scale of the norm before the vision blocks": ("pre_layrnorm", held_norm),
    "scale of the projector's norm": ("mm_soft_emb_norm", held_norm),
    "gate of the projector": ("multi_modal_projector.act", lambda act: held_gate(act.forward)),
    "pattern, scale and gate of the vision pooling head": ("vision_model.head", held_pooling),
}
"""The module at the end of this path, and its forward while it is held."""
LENGTHS = "lengths of both embeddings"


def detach(value: Tensor, hook: Any) -> Tensor:
    return value.detach()


@contextmanager
def holding(model: Any, names: Iterable[str], stack: str = "") -> Iterator[None]:
    """Hold what these names say, in runs of the live model. A stack ("text.1") leaves out what is held in another."""
    hooks = []
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            name = name.replace(stack, stack.partition(".")[0]) if stack else name
            if name.startswith("gate of the MLP of "):
                path = name.removeprefix("gate of the MLP of ")
                mlp = mlp_of(model, *path.split(".blocks."))
                if mlp is not None:
                    hold_mlp(patch, mlp)
            elif name in IN_WORDS:
                end, held = IN_WORDS[name]
                (module,) = [m for path, m in model.hf.named_modules() if path.endswith(end)]
                patch.setattr(module, "forward", held(module))
            elif name != LENGTHS:
                name = name if isinstance(model, HookedVLM) else name.removeprefix("text.")
                hooks += [(name, detach)] if name in model.hook_dict else []
        with model.hooks(fwd_hooks=hooks), torch.enable_grad():
            yield


def mlp_of(model: Any, tower: str, layer: str) -> Any:
    if not isinstance(model, HookedVLM):
        return model.blocks[int(layer)].mlp
    return model.blocks(tower)[int(layer)].mlp if tower in model.towers else None


def hold_mlp(patch: pytest.MonkeyPatch, mlp: Any) -> None:
    """The gate branch of a gated MLP is held whole; another MLP's activation is a multiple of its input."""
    name = next(n for n in ("activation_fn", "act_fn") if hasattr(mlp, n))
    act = getattr(mlp, name)
    gated = hasattr(mlp, "up_proj") or hasattr(mlp, "W_gate")
    if isinstance(act, torch.nn.Module):
        real, act, name = act.forward, act, "forward"
        patch.setattr(act, name, (lambda z: real(z).detach()) if gated else held_gate(real))
    else:
        patch.setattr(mlp, name, (lambda z: act(z).detach()) if gated else held_gate(act))


@contextmanager
def leaves(modules: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """While held, what these modules give is kept by name, and gradients end there."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            kept[name] = output.detach().clone().requires_grad_()
            return kept[name] * 1.0

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------------ live models


def rows_of(model: HookedVLM, names: list[str], less: str) -> Rows:
    """The edges from patches and words to the outputs: autograd through the model with these names held, less one."""
    names, batch = [name for name in names if name != less], batch_of(model)
    embed = next(m for m in model.hf.modules() if hasattr(m, "patch_embedding") or hasattr(m, "patch_embeddings"))
    conv = getattr(embed, "patch_embedding", None) or embed.patch_embeddings.projection
    if model.family in ("clip", "siglip"):
        return dual_rows(model, names, less, conv)
    text = {} if model.family == "vit" else {"text.tok": model.hf.get_input_embeddings()}
    with leaves({"vision.patch": conv, **text}) as kept, holding(model, names):
        logits = model(batch).logits[0]
        if model.family == "vit":
            output = logits[model.hf.config.label2id[TARGET.name]]
        else:
            yes, no = model.tokenizer.convert_tokens_to_ids([TARGET.yes, TARGET.no])
            output = logits[-1, yes] - logits[-1, no]
        found = {"vision.patch": patches(output, conv, kept["vision.patch"])}
        found |= {name: share(output, kept[name]) for name in text}
    return {("out.0", kind): value for kind, value in found.items()}


def share(output: Tensor, leaf: Tensor) -> Tensor:
    """Gradient times content of words `[1, pos, d]`, one number a position."""
    (gradient,) = torch.autograd.grad(output, leaf, retain_graph=True)
    return (gradient * leaf.detach()).sum(-1)[0]


def patches(output: Tensor, conv: Any, leaf: Tensor) -> Tensor:
    """The same of patches `[1, d, row, column]`, without the bias, which is a node of its own."""
    (gradient,) = torch.autograd.grad(output, leaf, retain_graph=True)
    content = leaf.detach() if conv.bias is None else leaf.detach() - conv.bias.detach()[:, None, None]
    return (gradient * content).sum(1).flatten()


CAPTIONS = (TARGET.positive, str(TARGET.negative))


@cache
def embeddings(family: str) -> tuple[Tensor, ...]:
    """Of the image, and of each caption, in the true pass."""
    model = model_of(family, DOUBLE)
    with torch.no_grad():
        return (model.encode_image(batch_of(model))[0], *(model.encode_text([c])[0] for c in CAPTIONS))


def dual_rows(model: HookedVLM, names: list[str], less: str, conv: Any) -> Rows:
    """The image half, and the text half of each caption; run again is only what the missing name can be of."""
    true = embeddings(model.family)
    held = LENGTHS in names
    scale = model.hf.logit_scale.exp().detach()

    def unit(value: Tensor) -> Tensor:
        return value / (value.norm().detach() if held else value.norm())

    found = {}
    if not less.startswith(("text", "gate of the MLP of text")):
        with leaves({"vision.patch": conv}) as kept, holding(model, names):
            image = unit(model.encode_image(batch_of(model))[0])
        half = scale * image @ (unit(true[1]) - unit(true[2]))
        found["out.0", "vision.patch"] = patches(half, conv, kept["vision.patch"])
    for i, sign in ((1, 1.0), (2, -1.0)):
        stack, other = f"text.{i - 1}", f"text.{2 - i}."
        if "vision" in less or other in less:
            continue
        with leaves({"tok": model.hf.text_model.embeddings.token_embedding}) as kept, holding(model, names, stack):
            text = unit(model.encode_text([CAPTIONS[i - 1]])[0])
        found[f"out.{i}", f"{stack}.tok"] = share(sign * scale * unit(true[0]) @ text, kept["tok"])
    return found


def lens_rows(model: Any, names: list[str], less: str) -> Rows:
    """The same for a TransformerLens model: from its words to a difference of logits."""
    names = [name for name in names if name != less]
    with leaves({"text.tok": model.hook_embed}) as kept, holding(model, names):
        logits = model(TOKENS[None])[0]
        return {("out.0", "text.tok"): share(logits[-1, 7] - logits[-1, 8], kept["text.tok"])}


# --------------------------------------------------------------------------------------------------------- the claim


def off(graph: AttributionGraph, found: Rows) -> float:
    """The largest difference from the graph's edges, relative to the largest edge of the same output and kind."""
    dense, index = graph.dense(), {name: i for i, name in enumerate(graph.nodes.ids)}
    row_of = {graph.nodes.ids[int(node)]: i for i, node in enumerate(graph.targets)}
    worst = 0.0
    for (output, kind), values in found.items():
        where = [index[name] for name in index if name.rpartition(".")[0] == kind]
        at = [int(name.rpartition(".")[2]) for name in index if name.rpartition(".")[0] == kind]
        first = at[0] if kind == "vision.patch" else 0  # patches are counted after a CLS token
        edges, live = dense[row_of[output], where], values.detach()[[i - first for i in at]]
        worst = max(worst, float((edges - live).abs().max() / edges.abs().max()))
    return worst


def exact(graph: AttributionGraph, rows: Callable[[list[str], str], Rows]) -> None:
    """With all of the names held the edges are autograd's, and with any one of them left out they are not."""
    names = graph.meta["freezes"]
    assert len(set(names)) == len(names) and off(graph, rows(names, "")) < 1e-9
    idle = [name for name in names if not off(graph, rows(names, name)) > 1e-7]
    assert not idle, f"named, and held or not it is the same: {idle}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_holds_exactly_what_it_names(family: str) -> None:
    """No name is missing from a graph's freezes and none is there for show, for each family of models."""
    model = model_of(family, DOUBLE)
    target = Target(TARGET.name, TARGET.positive) if family == "vit" else TARGET
    frozen = freeze(model, batch_of(model), [Contrast(target)], DOUBLE)
    exact(build_graph(frozen, [], mode="sae"), lambda names, less: rows_of(model, names, less))


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_a_language_model_holds_exactly_what_it_names(kind: str) -> None:
    """The same for each kind of TransformerLens model, with an activation whose gate matters to a gradient."""
    changes = {**KINDS, **MORE}[kind]
    model = lens(**{**changes, "act_fn": "gelu" if changes["act_fn"] == "relu" else changes["act_fn"]})
    frozen = from_transformer_lens(model, TOKENS, [TokenLogit(7, versus=8)])
    exact(build_graph(frozen, [], mode="sae"), lambda names, less: lens_rows(model, names, less))
