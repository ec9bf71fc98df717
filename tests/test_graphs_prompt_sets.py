"""A caption against the mean of a prompt set: the number, its halves, its rows, and the command that asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_graphs_frozen_models import batch_of, image, model_of
from test_graphs_sweep import dictionaries, rows_by_autograd, rows_by_sweep

from graphs.causal import Lab
from graphs.frozen import check, freeze, worst
from graphs.layout import Layout
from graphs.replace import Replacement
from graphs.targets import SetContrast
from mechinterp.audit import graph_command
from mechinterp.audit.graph_command import Wishes
from mechinterp.audit.graphing import asked_for
from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.types import Target

FLOAT, DOUBLE = torch.float32, torch.float64
LIMIT = {FLOAT: 1e-5, DOUBLE: 1e-10}
SET = ("effusion", "no finding", "a chest x-ray with cardiomegaly")
OUTPUT = SetContrast(Target("pneumonia", "a chest x-ray with pneumonia"), SET)


def directly(model: HookedVLM) -> float:
    """The similarity of the target less the mean of all similarities, from the embeddings of the plain model."""
    hf = model.hf
    f = model.encode_image(batch_of(model))[0].detach()
    texts = torch.stack([model.encode_text([caption])[0].detach() for caption in OUTPUT.captions])
    cosines = texts @ f / texts.norm(dim=1) / f.norm() * hf.logit_scale.detach().exp()
    return float(cosines[0] - cosines.mean())


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_each_half_is_the_similarity_less_the_mean(family: str, dtype: torch.dtype) -> None:
    """The image half and the text half, over all captions of the set, each sum to the number computed directly."""
    model = model_of(family, dtype)
    frozen = freeze(model, batch_of(model), [OUTPUT], dtype)
    want = directly(model)
    totals = [float((r.seed * frozen.stream_of(r)).sum()) + r.constant for r in frozen.readouts]
    assert abs(want) > 1e-3
    assert totals[0] == pytest.approx(want, abs=20 * LIMIT[dtype])
    assert sum(totals[1:]) == pytest.approx(want, abs=20 * LIMIT[dtype])
    assert [r.stack for r in frozen.readouts] == [0, 1, 2, 3, 4]
    assert sum(r.weight * r.value for r in frozen.readouts) == pytest.approx(want, abs=20 * LIMIT[dtype])
    assert worst(check(frozen)).relative < LIMIT[dtype]
    assert {r.kind for r in frozen.readouts} == {"contrast with a set"}
    assert float(Lab(model, batch_of(model), [], [OUTPUT]).values[0]) == pytest.approx(want, abs=20 * LIMIT[dtype])


def test_rows_of_a_prompt_set_are_the_autograd_rows() -> None:
    """Every edge into the halves, and into features, is what autograd of the frozen pass gives."""
    model = model_of("clip", DOUBLE)
    frozen = freeze(model, batch_of(model), [OUTPUT], DOUBLE)
    replacement = Replacement(frozen, dictionaries(frozen, "transcoder", width=12))
    layout = Layout(replacement)
    values, truth = rows_by_autograd(replacement, layout)
    assert replacement.n_features > 50 and len(values) == replacement.n_features + 5
    torch.testing.assert_close(rows_by_sweep(replacement, layout), truth, rtol=1e-9, atol=1e-11)


def test_a_set_needs_two_captions() -> None:
    """A set that is the target's own caption alone, or that holds an empty caption, is refused."""
    target = Target("x", "effusion")
    with pytest.raises(UsageError, match="one caption"):
        SetContrast(target, ("effusion",))
    with pytest.raises(UsageError, match="empty caption"):
        SetContrast(target, ("pneumonia", ""))


def test_the_command_takes_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--against "a;b"` explains the set's contrast, and says so in graph.json; one caption stays a contrast."""
    monkeypatch.setattr(graph_command, "gallery_of", lambda *args: {})  # pictures are not what is asked here
    monkeypatch.setattr("graphs.export.folder.write_folder", lambda whole, *args: whole.save(tmp_path / "out"))
    model = model_of("clip")
    placed = dictionaries(freeze(model, batch_of(model), [OUTPUT]), "transcoder", width=12)
    monkeypatch.setattr(graph_command, "_dictionaries", lambda *args: placed)
    file = tmp_path / "chest.png"
    Image.fromarray((image()[0] * 255).astype(np.uint8)).save(file)
    wishes = Wishes(OUTPUT.target.positive, "; ".join(SET), max_features=20)
    said = graph_command.graph_command(model, file, tmp_path / "out", wishes)
    outputs = json.loads((tmp_path / "out" / "graph.json").read_text())["outputs"]
    assert [o["kind"] for o in outputs] == ["contrast with a set"] * 5
    assert all(f"text half: {caption}" in said for caption in OUTPUT.captions)
    assert asked_for(model, "effusion", "pneumonia")[1].target.negative == "pneumonia"  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="llava model has no captions"):
        asked_for(model_of("llava"), "effusion", "pneumonia; no finding")
