"""Small random models of every family, from the real transformers classes, with a tokenizer and a preprocessor.

    hf_model, processor = tiny("clip")          # in memory
    save_tiny("clip", folder)                   # the same, as a transformers folder

Images are 32 px, patches 8 px (a 4 x 4 grid); towers are 32 wide and 3 blocks deep.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("clip", "siglip", "llava", "gemma3", "dinov2", "vit")
WORDS = (
    "a chest x-ray with without pneumonia effusion cardiomegaly portable marker no finding is there ? yes "
    "write report describe the image drain left right view ap pa sex age normal of and"
).split()
PAD, BOS, EOS, UNK, IMAGE, START, END = "<pad>", "<s>", "</s>", "<unk>", "<image>", "<boi>", "<eoi>"
SPECIAL = (PAD, BOS, EOS, UNK, IMAGE, START, END)
VOCAB = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
IMAGE_SIZE, PATCH, WIDTH, LAYERS = 32, 8, 32, 3


@dataclass
class TinyProcessor:
    """What a transformers processor is to us: an image processor and a tokenizer (None for a vision model)."""

    image_processor: Any
    tokenizer: Any = None

    def save_pretrained(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def tokenizer(generative: bool = False) -> Any:
    """A word-level tokenizer; dual encoders get <s> text </s>, generative models <s> text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(VOCAB, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BOS} $A" if generative else f"{BOS} $A {EOS}", special_tokens=[(BOS, VOCAB[BOS]), (EOS, VOCAB[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[IMAGE, START, END],
        model_max_length=24,
    )


def image_processor(family: str) -> Any:
    """The family's own image processor (PIL backend), for 32 px."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if family in ("siglip", "gemma3"):
        return SiglipImageProcessorPil(size=square)
    if family == "vit":
        return ViTImageProcessorPil(size=square)
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=square)


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, TinyProcessor]:
    """A random model of `family`, in eval mode, and its processor. `changes` go to the vision config."""
    import transformers as tf

    vision: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        **changes,
    }
    text: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": len(VOCAB),
        "max_position_embeddings": 24,
        "pad_token_id": VOCAB[PAD],
        "bos_token_id": VOCAB[BOS],
        "eos_token_id": VOCAB[EOS],
    }
    torch.manual_seed(seed)
    if family == "clip":
        model: Any = tf.CLIPModel(tf.CLIPConfig(text_config={**text}, vision_config=vision, projection_dim=16))
    elif family == "siglip":
        text = {**text, "projection_size": WIDTH}
        model = tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=vision))
    elif family == "llava":
        model = tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                vision_config=tf.CLIPVisionConfig(**vision),
                text_config=tf.LlamaConfig(**{**text, "num_key_value_heads": 2, "max_position_embeddings": 64}),
                image_token_index=VOCAB[IMAGE],
                vision_feature_layer=-2,
                vision_feature_select_strategy="default",
            )
        )
    elif family == "gemma3":
        text = {**text, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 4}
        text |= {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
        model = tf.Gemma3ForConditionalGeneration(
            tf.Gemma3Config(
                vision_config=tf.SiglipVisionConfig(**vision, vision_use_head=False),
                text_config=tf.Gemma3TextConfig(**text),
                mm_tokens_per_image=4,
                image_token_index=VOCAB[IMAGE],
                boi_token_index=VOCAB[START],
                eoi_token_index=VOCAB[END],
            )
        )
        # transformers starts this projector at zero, which would hide the image from the language model
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    elif family == "dinov2":
        model = tf.Dinov2Model(tf.Dinov2Config(**{k: v for k, v in vision.items() if k != "intermediate_size"}))
    elif family == "vit":
        labels = {0: "no finding", 1: "pneumonia", 2: "effusion"}
        config = tf.ViTConfig(**vision, id2label=labels, label2id={v: k for k, v in labels.items()})
        model = tf.ViTForImageClassification(config)
    else:
        raise ValueError(family)
    _enliven(model)
    words = None if family in ("dinov2", "vit") else tokenizer(family in ("llava", "gemma3"))
    return model.to(dtype).eval(), TinyProcessor(image_processor(family), words)


def save_tiny(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write `tiny(family)` as a transformers folder: config, model.safetensors, tokenizer, preprocessor."""
    model, processor = tiny(family, seed, **changes)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def _enliven(model: torch.nn.Module) -> None:
    """Make every part matter: random norms, biases and layer scales instead of ones and zeros; larger matrices."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and parameter.numel() > 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
