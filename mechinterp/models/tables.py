"""The families of models that can be opened: one declarative table each.

A table says where the modules are. Paths are relative to the transformers model (or to the block, in `Block`); `a|b`
means whichever of the two exists, for modules that transformers moved. The paths are resolved when a model is opened;
one that leads nowhere raises ModelError with the list of what exists there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Block", "Classifier", "Dual", "Family", "Features", "Generative", "Head", "Tower", "Wire", "families"]


@dataclass(frozen=True)
class Block:
    """Module paths inside one transformer block.

    `attn_out` and `mlp_out` are the modules whose output is added to the residual stream (after a layer scale or a
    post-norm, where there is one), so that resid_pre + attn_out = resid_mid and resid_mid + mlp_out = resid_post.
    """

    ln1: str
    attn: str
    out_proj: str
    attn_out: str
    ln2: str
    mlp_pre: str
    mlp_post: str
    mlp_out: str
    ln1_post: str | None = None
    ln2_post: str | None = None


@dataclass(frozen=True)
class Wire:
    """A hook point on the `side` ("input", "output", or "cls": row 0 of the output) of one module."""

    path: str
    side: str


@dataclass(frozen=True)
class Tower:
    """One stack of blocks: its module, its blocks, the final norm, and the wires that only it has."""

    module: str
    layers: str
    block: Block
    ln_final: str | None = None
    wires: Mapping[str, Wire] = field(default_factory=dict)


@dataclass(frozen=True)
class Dual:
    """Two encoders: a target is scored by scaled cosine."""


@dataclass(frozen=True)
class Generative:
    """A language model that sees the image: a target is scored by the logits of two answer tokens."""

    projector: str
    prompt: str = "USER: {image}\n{question} ASSISTANT:"


@dataclass(frozen=True)
class Classifier:
    """Fixed classes: a target is scored by the logit of its class."""

    module: str


@dataclass(frozen=True)
class Features:
    """Only an image embedding: nothing to score a target with."""


Head = Dual | Generative | Classifier | Features


@dataclass(frozen=True)
class Family:
    """A table: the transformers class, what released medical models it opens, and where the modules are."""

    name: str
    architecture: str
    model_type: str
    released: tuple[str, ...]
    towers: Mapping[str, Tower]
    head: Head
    has_cls: bool
    wires: Mapping[str, Wire] = field(default_factory=dict)


_CLIP_BLOCK = Block(
    ln1="layer_norm1",
    attn="self_attn",
    out_proj="self_attn.out_proj",
    attn_out="self_attn.out_proj",
    ln2="layer_norm2",
    mlp_pre="mlp.fc1",
    mlp_post="mlp.fc2",
    mlp_out="mlp",
)
_LLAMA_BLOCK = Block(
    ln1="input_layernorm",
    attn="self_attn",
    out_proj="self_attn.o_proj",
    attn_out="self_attn.o_proj",
    ln2="post_attention_layernorm",
    mlp_pre="mlp.gate_proj",
    mlp_post="mlp.down_proj",
    mlp_out="mlp",
)
_GEMMA_BLOCK = Block(
    ln1="input_layernorm",
    attn="self_attn",
    out_proj="self_attn.o_proj",
    attn_out="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    mlp_pre="mlp.gate_proj",
    mlp_post="mlp.down_proj",
    mlp_out="post_feedforward_layernorm",
    ln1_post="post_attention_layernorm",
    ln2_post="post_feedforward_layernorm",
)
_DINO_BLOCK = Block(
    ln1="norm1",
    attn="attention",
    out_proj="attention.o_proj",
    attn_out="layer_scale1",
    ln2="norm2",
    mlp_pre="mlp.fc1|mlp.gate_proj",
    mlp_post="mlp.fc2|mlp.down_proj",
    mlp_out="layer_scale2",
)
_VIT_BLOCK = Block(
    ln1="layernorm_before",
    attn="attention",
    out_proj="attention.o_proj",
    attn_out="attention.o_proj",
    ln2="layernorm_after",
    mlp_pre="mlp.fc1",
    mlp_post="mlp.fc2",
    mlp_out="mlp",
)

_CLIP = Family(
    name="clip",
    architecture="CLIPModel",
    model_type="clip",
    released=("PubMedCLIP (flaviagiammarino/pubmed-clip-vit-base-patch32)", "PLIP (vinid/plip)", "openai/clip-vit-*"),
    towers={
        "vision": Tower(
            "vision_model",
            "vision_model.encoder.layers",
            _CLIP_BLOCK,
            "vision_model.post_layernorm",
            {"hook_pooled": Wire("visual_projection", "input")},
        ),
        "text": Tower(
            "text_model",
            "text_model.encoder.layers",
            _CLIP_BLOCK,
            "text_model.final_layer_norm",
            {"hook_pooled": Wire("text_projection", "input")},
        ),
    },
    head=Dual(),
    has_cls=True,
    wires={
        "projector.hook_out": Wire("visual_projection", "output"),
        "text_projector.hook_out": Wire("text_projection", "output"),
    },
)
_SIGLIP = Family(
    name="siglip",
    architecture="SiglipModel",
    model_type="siglip",
    released=("MedSigLIP (google/medsiglip-448)", "google/siglip-*"),
    towers={
        "vision": Tower(
            "vision_model",
            "vision_model.encoder.layers",
            _CLIP_BLOCK,
            "vision_model.post_layernorm",
            {"hook_pooled": Wire("vision_model.head", "output")},
        ),
        "text": Tower(
            "text_model",
            "text_model.encoder.layers",
            _CLIP_BLOCK,
            "text_model.final_layer_norm",
            {"hook_pooled": Wire("text_model.head", "input")},
        ),
    },
    head=Dual(),
    has_cls=False,
    wires={"text_projector.hook_out": Wire("text_model.head", "output")},
)
_LLAVA = Family(
    name="llava",
    architecture="LlavaForConditionalGeneration",
    model_type="llava",
    released=("LLaVA-Med v1.5 (converted to the transformers layout)", "llava-hf/llava-1.5-*"),
    towers={
        # the projector reads a hidden state before the final norm, so the vision tower has no ln_final here
        "vision": Tower(
            "model.vision_tower",
            "model.vision_tower.encoder.layers|model.vision_tower.vision_model.encoder.layers",
            _CLIP_BLOCK,
        ),
        "text": Tower(
            "model.language_model",
            "model.language_model.layers",
            _LLAMA_BLOCK,
            "model.language_model.norm",
            {"hook_logits": Wire("lm_head", "output")},
        ),
    },
    head=Generative("model.multi_modal_projector"),
    has_cls=True,
    wires={"projector.hook_out": Wire("model.multi_modal_projector", "output")},
)
_GEMMA3 = Family(
    name="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    model_type="gemma3",
    released=("MedGemma (google/medgemma-4b-it, google/medgemma-27b-it)", "google/gemma-3-*-it"),
    towers={
        "vision": Tower(
            "model.vision_tower",
            "model.vision_tower.encoder.layers|model.vision_tower.vision_model.encoder.layers",
            _CLIP_BLOCK,
            "model.vision_tower.post_layernorm|model.vision_tower.vision_model.post_layernorm",
        ),
        "text": Tower(
            "model.language_model",
            "model.language_model.layers",
            _GEMMA_BLOCK,
            "model.language_model.norm",
            {"hook_logits": Wire("lm_head", "output")},
        ),
    },
    head=Generative("model.multi_modal_projector", prompt="{image}{question}"),
    has_cls=False,
    wires={"projector.hook_out": Wire("model.multi_modal_projector", "output")},
)
_DINOV2 = Family(
    name="dinov2",
    architecture="Dinov2Model",
    model_type="dinov2",
    released=("RAD-DINO (microsoft/rad-dino)", "facebook/dinov2-*"),
    towers={
        "vision": Tower("encoder", "encoder.layer", _DINO_BLOCK, "layernorm", {"hook_pooled": Wire("layernorm", "cls")})
    },
    head=Features(),
    has_cls=True,
)
_VIT = Family(
    name="vit",
    architecture="ViTForImageClassification",
    model_type="vit",
    released=("any ViT image classifier, such as a fine-tuned google/vit-base-patch16-224",),
    towers={
        "vision": Tower(
            "vit",
            "vit.layers|vit.encoder.layer",
            _VIT_BLOCK,
            "vit.layernorm",
            {"hook_pooled": Wire("classifier", "input"), "hook_logits": Wire("classifier", "output")},
        )
    },
    head=Classifier("classifier"),
    has_cls=True,
)

_FAMILIES = (_CLIP, _SIGLIP, _LLAVA, _GEMMA3, _DINOV2, _VIT)


def families() -> tuple[Family, ...]:
    """Every family that can be opened, with the released medical models that belong to it."""
    return _FAMILIES
