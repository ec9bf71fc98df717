"""A model folder opens completely or is refused with the file and what to do; damaged bytes give only our errors."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, save_tiny, tiny

from mechinterp.errors import MechInterpError, ModelError
from mechinterp.models import HookedVLM, bundled


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


@pytest.fixture
def folder(whole: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family="clip": Path(shutil.copytree(whole(family), tmp_path / "model"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_opens_as_the_model_it_was_saved_from(whole: Callable[[str], Path], family: str) -> None:
    model = HookedVLM.from_pretrained(whole(family))
    in_memory = HookedVLM(*tiny(family))
    assert model.family == family and model.sha256 == in_memory.sha256
    assert model.image_processor == in_memory.image_processor
    assert not model.hf.training and not any(p.requires_grad for p in model.hf.parameters())
    assert model.hf.config._attn_implementation == "sdpa"


def test_another_dtype(whole: Callable[[str], Path]) -> None:
    assert HookedVLM.from_pretrained(whole("vit"), dtype=torch.bfloat16).hf.dtype == torch.bfloat16


def test_a_processor_config_alone_is_enough(folder: Callable[..., Path]) -> None:
    at = folder()
    images = json.loads((at / "preprocessor_config.json").read_text())
    (at / "preprocessor_config.json").unlink()
    (at / "processor_config.json").write_text(json.dumps({"image_processor": images}))
    assert HookedVLM.from_pretrained(at).image_processor == HookedVLM(*tiny("clip")).image_processor


def test_sharded_weights_open_and_a_lost_shard_is_named(folder: Callable[..., Path], whole: Callable) -> None:
    at = folder()
    tensors = load_file(at / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, at / name, metadata={"format": "pt"})
    (at / "model.safetensors").unlink()
    index = at / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {k: n for n, ks in parts.items() for k in ks}}))
    assert HookedVLM.from_pretrained(at).sha256 == HookedVLM.from_pretrained(whole("clip")).sha256
    (at / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors"):
        HookedVLM.from_pretrained(at)
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(ModelError, match="not in the folder"):
        HookedVLM.from_pretrained(at)


def truncate(name: str, share: float) -> Callable[[Path], None]:
    def cut(at: Path) -> None:
        content = (at / name).read_bytes()
        (at / name).write_bytes(content[: int(len(content) * share)])

    return cut


def without(name: str) -> Callable[[Path], None]:
    return lambda at: (at / name).unlink()


def config(**changes: object) -> Callable[[Path], None]:
    return lambda at: edit_json(at / "config.json", **changes)


def vision(**changes: object) -> Callable[[Path], None]:
    def change(at: Path) -> None:
        nested = json.loads((at / "config.json").read_text())["vision_config"]
        edit_json(at / "config.json", vision_config={**nested, **changes})

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(at: Path) -> None:
        tensors = load_file(at / "model.safetensors")
        change(tensors)
        save_file(tensors, at / "model.safetensors", metadata={"format": "pt"})

    return apply


def pickled(at: Path) -> None:
    (at / "model.safetensors").unlink()
    (at / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


NORM = "vision_model.post_layernorm.weight"
BROKEN = {
    "no config": (without("config.json"), r"config\.json.*missing"),
    "cut config": (truncate("config.json", 0.5), r"config\.json"),
    "empty config": (truncate("config.json", 0), r"config\.json"),
    "list config": (lambda at: (at / "config.json").write_text("[1]"), "not a JSON object"),
    "deep config": (lambda at: (at / "config.json").write_text("[" * 100_000), r"config\.json"),
    "remote code": (config(auto_map={"AutoModel": "evil.Model"}), "remote code"),
    "unknown type": (config(model_type="whisper"), "whisper.*known: clip/CLIPModel"),
    "other class": (config(architectures=["CLIPVisionModel"]), "CLIPVisionModel"),
    "quantised": (config(quantization_config={"quant_method": "bitsandbytes"}), "quantised"),
    "no weights": (without("model.safetensors"), r"model\.safetensors.*missing"),
    "pickle only": (pickled, r"pytorch_model\.bin can run code"),
    "cut weights": (truncate("model.safetensors", 0.7), r"model\.safetensors.*(truncated|damaged)"),
    "empty weights": (truncate("model.safetensors", 0), r"model\.safetensors"),
    "unused weight": (weights(lambda t: t.update(extra=torch.zeros(2))), "not in the model: extra"),
    "missing weight": (weights(lambda t: (t.pop(NORM), t.update(pad=torch.zeros(99)))), f"would be random: {NORM}"),
    "fewer weights": (weights(lambda t: t.pop(NORM)), "files hold"),
    "wrong shape": (weights(lambda t: t.update({NORM: torch.zeros(7)})), rf"{NORM} is \[7\] in the files, \[32\]"),
    "nan weight": (weights(lambda t: t[NORM].fill_(float("nan"))), f"{NORM} holds a NaN"),
    "huge width": (vision(hidden_size=10**9, num_attention_heads=1), "hidden_size|in the files"),
    "huge depth": (vision(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "huge image": (vision(image_size=10**8, patch_size=1), "in the files"),
    "huge labels": (config(num_labels=10**9), "num_labels"),
    "no heads": (vision(num_attention_heads=0), r"config\.json"),
    "text width": (vision(hidden_size="wide"), r"config\.json"),
    "no preprocessor": (without("preprocessor_config.json"), r"preprocessor_config\.json.*missing"),
    "cut preprocessor": (truncate("preprocessor_config.json", 0.5), r"preprocessor_config\.json"),
    "pixel range": (lambda at: edit_json(at / "preprocessor_config.json", rescale_factor=1.0), "pixel range"),
    "other size": (lambda at: edit_json(at / "preprocessor_config.json", crop_size=64), "64 x 64 for a model of 32"),
    "no tokenizer": (without("tokenizer.json"), r"tokenizer\.json.*missing"),
    "cut tokenizer": (truncate("tokenizer.json", 0.5), r"tokenizer\.json"),
    "no tokens": (lambda at: (at / "tokenizer.json").write_text("{}"), r"tokenizer\.json"),
    "tokenizer code": (lambda at: edit_json(at / "tokenizer_config.json", auto_map={"x": "y"}), "remote code"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_by_file_and_with_a_hint(case: str, folder: Callable[..., Path]) -> None:
    at = folder()
    damage, message = BROKEN[case]
    damage(at)
    with pytest.raises(ModelError, match=message) as caught:
        HookedVLM.from_pretrained(at)
    assert caught.value.hint and len(str(caught.value)) < 1500


def test_a_tokenizer_of_another_model_is_refused(folder: Callable[..., Path]) -> None:
    at = folder()
    tokens = json.loads((at / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["hernia"] = 4000
    (at / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ModelError, match="tokens up to 4000"):
        HookedVLM.from_pretrained(at)


def test_what_is_no_model_at_all(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "nowhere", "/", __file__, "../x/y", ""):
        with pytest.raises(ModelError):
            HookedVLM.from_pretrained(name)


def test_a_hub_id_must_be_pinned(monkeypatch: pytest.MonkeyPatch, whole: Callable[[str], Path]) -> None:
    import huggingface_hub

    asked: list[tuple[str, str | None]] = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in allow_patterns)
        if name == "some/offline":
            raise OSError("no route to host")
        return str(whole("vit"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for revision in (None, "main", "abc1234"):
        with pytest.raises(ModelError, match="commit hash"):
            HookedVLM.from_pretrained("some/model", revision=revision)
    assert not asked
    HookedVLM.from_pretrained("some/model", revision="0" * 40)
    HookedVLM.from_pretrained("some/model", allow_moving=True)
    assert asked == [("some/model", "0" * 40), ("some/model", None)]
    with pytest.raises(ModelError, match="no route"):
        HookedVLM.from_pretrained("some/offline", revision="0" * 40)


def test_byte_flips_give_only_our_errors(whole: Callable[[str], Path], tmp_path: Path) -> None:
    """Sixty damaged folders: each opens (where the flip is harmless) or is refused by us, and none hangs."""
    rng = random.Random(0)
    source = whole("clip")
    names = sorted(p.name for p in source.iterdir())
    refused = 0
    for trial in range(60):
        at = Path(shutil.copytree(source, tmp_path / str(trial)))
        path = at / names[trial % len(names)]
        content = bytearray(path.read_bytes())
        reach = len(content) if trial % 2 else min(len(content), 4000)  # headers are where it hurts
        for _ in range(rng.choice([1, 1, 4])):
            content[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(content))
        try:
            HookedVLM.from_pretrained(at)
        except MechInterpError as error:
            refused += 1
            assert error.hint is None or len(error.hint) < 600
        shutil.rmtree(at)
    assert refused > 15


def test_bundled_names_open_their_folder(monkeypatch: pytest.MonkeyPatch, whole: Callable[[str], Path]) -> None:
    from mechinterp.models import bundles

    assert all(bundles.bundled_folder(name) is not None for name in bundled())
    monkeypatch.setattr(bundles, "_ROOT", whole("vit").parent)
    name = whole("vit").name
    assert name in bundled()
    assert HookedVLM.from_pretrained(name).family == "vit"
    assert bundles.bundled_folder("..") is None


def test_importing_the_room_costs_nothing() -> None:
    code = "import sys; from mechinterp.models import bundled; bundled(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
