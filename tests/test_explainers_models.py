"""Explainers of vision-language models of every family: attention, cams, patch embeddings, our own methods."""

from __future__ import annotations

import json
from dataclasses import replace

import networkx
import numpy as np
import pytest
import torch
from PIL import Image
from test_explain import FAMILIES, TARGET, images
from tiny_models import save_tiny, tiny

from graphs.build import build_graph
from graphs.frozen import freeze
from mechinterp.audit.explaining import OWN, explain_image
from mechinterp.audit.graphing import output_of
from mechinterp.audit.own_methods import own_methods, sae_maps
from mechinterp.cli import main
from mechinterp.errors import ModelError, UsageError
from mechinterp.explain import ELEMENT_METHODS, applies
from mechinterp.explain.ask import about_both, about_image, about_words
from mechinterp.explain.flow import flows
from mechinterp.explain.patches import in_patches
from mechinterp.explain.question import Question
from mechinterp.explain.reading import paths, pooling
from mechinterp.interventions import effects
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Site
from saes.dictionary import SparseDictionary, TopK

CHEAP = {"kernel_shap": 6, "lime": 6, "rise": 6}
REAL = [name for name, method in ELEMENT_METHODS.items() if not method.anchor]


@pytest.fixture(scope="module")
def models() -> dict[str, HookedVLM]:
    return {family: HookedVLM(*tiny(family)) for family in FAMILIES}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def explained(name: str, question: Question, seed: int = 0) -> torch.Tensor:
    more = {"samples": CHEAP[name]} if name in CHEAP else {}
    return ELEMENT_METHODS[name].explain(question, draw(seed), **more)


ASKED = [
    ("clip", "words"),
    ("clip", "both"),
    ("siglip", "image"),
    ("siglip", "words"),
    ("vit", "image"),
    ("llava", "both"),
    ("gemma3", "both"),
]


def asked(model: HookedVLM, about: str, n: int = 2) -> Question:
    make = {"image": about_image, "words": about_words, "both": about_both}[about]
    return make(model, images(model, n), TARGET)


@pytest.mark.parametrize(("family", "about"), ASKED)
def test_every_method_answers_every_question(models, family, about):
    """Finite numbers that do not ask for gradients, and a model left as it was."""
    question = asked(models[family], about)
    for name in REAL:
        assert applies(ELEMENT_METHODS[name], question)
        found = explained(name, question)
        assert found.shape == (2, question.count) and found.isfinite().all() and not found.requires_grad, name
    assert not models[family].hooked()
    assert all(parameter.grad is None for parameter in models[family].hf.parameters())


@pytest.mark.parametrize("name", REAL)
def test_chunks_change_nothing_and_a_seed_gives_the_same_bytes(models, name):
    """Rounding apart a map is the same with 1, 3 or 7 rows through the model at once, and never are there more."""
    reads_inside = ELEMENT_METHODS[name].needs != "nothing"
    question = asked(models["clip"], "both" if reads_inside else "image", 3 if reads_inside else 1)
    found = explained(name, question)
    seen = []

    def counted(values):
        seen.append(len(values[0]))
        return question.function(values)

    for chunk in (1, 3, 7):
        few = replace(question, chunk=chunk, function=counted)
        torch.testing.assert_close(explained(name, few), found, atol=1e-5, rtol=1e-4)
        assert max(seen, default=0) <= chunk
    assert torch.equal(explained(name, question), found)
    assert torch.equal(explained(name, question, seed=1), found) is not ELEMENT_METHODS[name].stochastic


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_is_the_same_among_patch_embeddings(models, family):
    model = models[family]
    question = about_image(model, images(model, 3), TARGET, "blur")
    moved = in_patches(question)
    assert moved is not question
    weight = torch.rand(4, question.count, generator=draw())
    torch.testing.assert_close(moved.shared(weight), question.shared(weight), atol=1e-5, rtol=1e-5)
    slopes = [
        one.gathered((one.gradients(one.values)[0][0] * (one.parts[0].value - one.parts[0].reference),))
        for one in (moved, question)
    ]
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-4)


def test_a_tower_that_does_not_fit_is_asked_in_pixels(models):
    """Patch tokens that see their neighbours before the first block cannot be mixed one by one."""
    model = models["clip"]
    question = about_image(model, images(model), TARGET)
    embeddings = model.hf.vision_model.embeddings
    plain = type(embeddings).forward
    try:
        embeddings.forward = lambda x, **more: plain(embeddings, x.roll(4, -1), **more)
        assert in_patches(question) is question
    finally:
        del embeddings.forward
    assert in_patches(question) is not question


# ----------------------------------------------------------------------------------------------------- attention


def patterns(model: HookedVLM, batch, tower: str = "vision") -> list[torch.Tensor]:
    _, cache = model.run_with_cache(batch, names_filter=f"{tower}.blocks.*.attn.hook_pattern")
    return [cache[f"{tower}.blocks.{layer}.attn.hook_pattern"] for layer in range(model.n_layers(tower))]


@pytest.mark.parametrize("family", ["clip", "vit"])
def test_rollout_is_the_product_of_mean_patterns_and_identity(models, family):
    model = models[family]
    batch = images(model)
    rolled = torch.eye(17)
    for pattern in patterns(model, batch):
        rolled = (0.5 * pattern.mean(1) + 0.5 * torch.eye(17)) @ rolled
    found = explained("attention_rollout", about_image(model, batch, TARGET))
    torch.testing.assert_close(found, rolled[:, 0, 1:])


def test_rollout_of_a_generative_model_passes_its_language_blocks_first(models):
    model = models["llava"]
    batch = images(model)
    towers = []
    for tower in ("vision", "text"):
        tokens = patterns(model, batch, tower)
        rolled = torch.eye(tokens[0].shape[-1])
        for pattern in tokens:
            rolled = (0.5 * pattern.mean(1) + 0.5 * torch.eye(rolled.shape[-1])) @ rolled
        towers.append(rolled)
    image = (batch.input_ids[0] == model.hf.config.image_token_index).nonzero()[:, 0]
    expected = (towers[1][:, -1:, image] @ towers[0][:, 1:])[:, 0, 1:]
    torch.testing.assert_close(explained("attention_rollout", about_image(model, batch, TARGET)), expected)


def test_transmm_is_its_update_rule(models):
    """R <- R + mean over heads of (gradient * pattern)^+ @ R, from the identity; gradients by finite pattern edits."""
    model = models["clip"]
    batch = images(model)
    leaves = [pattern.requires_grad_() for pattern in patterns(model, batch)]
    names = [f"vision.blocks.{layer}.attn.hook_pattern" for layer in range(3)]
    # each pattern as a leaf of its own run, the others left to follow: the derivative of the score in that pattern
    relevance = torch.eye(17)
    for name, leaf in zip(names, leaves, strict=True):
        with model.hooks(fwd_hooks=[(name, lambda value, hook, leaf=leaf: leaf)]):
            gradient = torch.autograd.grad(model.score(batch, [TARGET]).sum(), leaf)[0]
        relevance = relevance + (gradient * leaf).clamp(min=0).mean(1) @ relevance
    found = explained("transmm", about_image(model, batch, TARGET))
    torch.testing.assert_close(found, relevance[:, 0, 1:].detach(), atol=1e-6, rtol=1e-4)


def test_a_pooling_head_is_written_out_as_it_is(models):
    model = models["siglip"]
    hidden = torch.randn(2, 16, 32, generator=draw())
    pattern, output = pooling(model.hf.vision_model.head, hidden)
    torch.testing.assert_close(output, model.hf.vision_model.head(hidden))
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 1))


def test_words_are_read_at_the_token_that_is_pooled(models):
    for family in ("clip", "siglip"):
        model = models[family]
        path = paths(about_words(model, images(model), TARGET), "rollout", gradients=False)[0]
        # transformers pools a CLIP of this config at its largest id, a SigLIP at the last token, padding or not
        ids = torch.tensor(model.tokenizer(TARGET.positive)["input_ids"])
        assert path.start.argmax(1).tolist() == [int(ids.argmax()) if family == "clip" else path.start.shape[1] - 1] * 2


def test_gemma_tokens_stand_for_squares_of_patches(models):
    model = models["gemma3"]
    bridge = next(
        stage
        for stage in paths(about_image(model, images(model), TARGET), "rollout", gradients=False)[0].stages
        if isinstance(stage, torch.Tensor)
    )
    used = bridge[bridge.sum(1) > 0].view(4, 4, 4)
    expected = torch.zeros(4, 4)
    expected[:2, 2:] = 0.25
    assert len(used) == 4 and torch.equal(used[1], expected)


def test_flow_is_networkxs():
    rng = np.random.default_rng(0)
    start, first, second = rng.dirichlet(np.ones(5)), *(rng.dirichlet(np.full(5, 0.3), (2, 5)))
    found = flows(
        torch.tensor(start)[None], [torch.tensor(first)[None], torch.tensor(second)[None]], torch.arange(1, 5)
    )
    for element in range(1, 5):
        graph = networkx.DiGraph()
        for i in range(5):
            graph.add_edge("readout", ("a", i), capacity=start[i])
            graph.add_edge(("b", i), "element", capacity=second[i, element])
            for j in range(5):
                graph.add_edge(("a", i), ("b", j), capacity=first[i, j])
        expected = networkx.maximum_flow_value(graph, "readout", "element")
        assert abs(float(found[0, element - 1]) - expected) < 1e-7


def test_attention_flow_of_a_model_is_networkxs_on_its_patterns(models):
    """Capacities are half the mean pattern and half the identity, block by block, from the class token down."""
    model = models["clip"]
    batch = images(model, 1)
    found = explained("attention_flow", about_image(model, batch, TARGET))[0]
    mixed = [0.5 * p[0].mean(0).double() + 0.5 * torch.eye(17).double() for p in reversed(patterns(model, batch))]
    graph = networkx.DiGraph()
    for depth, matrix in enumerate(mixed):
        for (above, below), capacity in np.ndenumerate(matrix.numpy()):
            graph.add_edge((depth, above), (depth + 1, below), capacity=float(capacity))
    wanted = [networkx.maximum_flow_value(graph, (0, 0), (len(mixed), 1 + patch)) for patch in (0, 7, 15)]
    torch.testing.assert_close(found[[0, 7, 15]].double(), torch.tensor(wanted).double(), atol=1e-6, rtol=1e-5)


def test_a_cam_of_words_reads_the_text_tower(models):
    """The formula at the words' tokens before the last text block that they matter after."""
    model = models["clip"]
    question = about_words(model, images(model), TARGET)
    kept = {}

    def keep(value, hook):
        kept.setdefault("value", value)

    leaves = tuple(value.clone().requires_grad_() for value in question.values)
    with model.hooks(fwd_hooks=[("text.blocks.2.hook_resid_pre", keep)]):
        score = question.function(leaves).sum()
    gradient = torch.autograd.grad(score, kept["value"])[0]
    words = slice(1, 1 + question.count)
    expected = torch.einsum("rwd,rd->rw", kept["value"][:, words], gradient[:, words].mean(1)).relu().detach()
    torch.testing.assert_close(explained("grad_cam", question), expected, atol=1e-6, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------- our own


def dictionary(model: HookedVLM, site: str = "vision.blocks.1.hook_resid_post") -> Placed:
    encoder = torch.randn(32, 24, generator=draw())
    return Placed.sae(SparseDictionary(encoder, encoder.T.clone(), torch.zeros(24), torch.zeros(32), TopK(3)), site)


def test_maps_of_features_are_ablation_effects_where_the_features_are_active(models):
    model = models["clip"]
    batch, placed = images(model), dictionary(model)
    question = about_image(model, batch, TARGET)
    found = sae_maps(question, draw(), model=model, placed=placed, most=24)
    lost = -effects(model, placed, batch, [TARGET], tokens="patch").dense()[..., 0].T
    _, cache = model.run_with_cache(batch, names_filter=str(placed.reads))
    active = placed.dictionary.encode(cache[str(placed.reads)])[:, 1:]
    share = active / active.sum(1, keepdim=True).clamp(min=1e-9)
    torch.testing.assert_close(found, torch.einsum("rf,rpf->rp", lost, share), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.sum(1), lost.sum(1), atol=1e-5, rtol=1e-4)
    one_by_one = sae_maps(replace(question, chunk=1), draw(), model=model, placed=placed, most=24)
    torch.testing.assert_close(one_by_one, found, atol=1e-6, rtol=1e-4)
    few = sae_maps(question, draw(), model=model, placed=placed, most=2)
    alone = sae_maps(question[1:], draw(), model=model, placed=placed, most=2)
    torch.testing.assert_close(few[1:], alone, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(few, found, atol=1e-4)
    # the two of each image with the largest |activation times gradient along the decoder row|, and no other
    leaf = cache[str(placed.writes)].clone().requires_grad_()
    score = model.run_from(str(placed.writes), leaf, batch, [TARGET])[:, 0]
    slope = torch.autograd.grad(score.sum(), leaf)[0][:, 1:] @ placed.dictionary.W_dec.T
    best = torch.zeros(2, 24).scatter_(1, (active * slope).sum(1).abs().topk(2).indices, 1.0)
    torch.testing.assert_close(few, torch.einsum("rf,rpf->rp", lost * best, share), atol=1e-5, rtol=1e-4)


def test_patches_of_graphs_have_the_influence_that_each_image_s_own_graph_says(models):
    model, generator = models["clip"], draw(5)
    encoder, decoder = (torch.randn(32, 24, generator=generator) for _ in range(2))
    made = SparseDictionary(encoder, decoder.T.clone(), torch.zeros(24), torch.zeros(32), TopK(3), centred=False)
    reads, writes = "vision.blocks.0.ln2.hook_normalized", "vision.blocks.0.hook_mlp_out"
    placed = [Placed(made, Site.parse(reads), Site.parse(writes))]
    question = about_image(model, images(model), TARGET)
    method = own_methods(model, transcoders=placed)["graph_patches"]
    found = method.explain(question, draw())
    assert (found >= 0).all() and (found.sum(1) < 1).all()
    turned = question.at((question.values[0].flip(-1),))  # perturbed copies are explained, not the images asked about
    assert not torch.allclose(method.explain(turned, draw()), found, atol=1e-3)
    graph = build_graph(freeze(model, images(model)[1:2], [output_of(model, TARGET)]), placed, max_features=300)
    by_label = dict(zip(graph.nodes.labels, graph.nodes.influence.tolist(), strict=True))
    rows, columns = question.shape
    named = [by_label[f"patch {r},{c}"] for r in range(rows) for c in range(columns)]
    torch.testing.assert_close(found[1], torch.tensor(named), atol=1e-6, rtol=1e-4)


def test_own_methods_explain_another_model_with_that_models_features_or_not_at_all(models):
    one, other = models["clip"], models["vit"]
    mine, theirs = dictionary(one), dictionary(other, "vision.blocks.0.hook_resid_post")
    asked_for = []

    def others(model):
        asked_for.append(model)
        return theirs, ()

    alone = own_methods(one, mine)["sae_maps"]
    assert not applies(alone, asked(one, "words"))
    question = about_image(other, images(other), TARGET)
    assert not applies(alone, question)
    with pytest.raises(UsageError, match="sae_maps: has no dictionary for this model"):
        alone.explain(question, draw())
    both = own_methods(one, mine, others=others)["sae_maps"]
    assert applies(both, question) and applies(both, asked(one, "image"))
    expected = sae_maps(question, draw(), model=other, placed=theirs)
    assert torch.equal(both.explain(question, draw()), expected) and expected.any()
    assert asked_for == [other]  # once; and never for its own

    def none(model):
        raise ModelError("has no site", where=model.label)

    assert not applies(own_methods(one, mine, others=none)["sae_maps"], question)
    assert own_methods(one) == {}


def test_the_command_takes_every_name_and_says_what_a_map_is_worth(tmp_path, capsys):
    folder = save_tiny("vit", tmp_path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)).save(tmp_path / "a.png")
    call = ["explain", str(folder), "--image", str(tmp_path / "a.png"), "--target", "pneumonia", "--seed", "3"]
    assert main([*call, "--method", "constant", "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "map.json").read_text())
    assert record["status"] == "constant" and record["seed"] == 3 and record["anchor"] and record["seconds"] > 0
    assert "ranks no pixel above another" in capsys.readouterr().out
    assert main([*call, "--method", "tea-leaves", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in (*ELEMENT_METHODS, *OWN)) and len(said.splitlines()) == 1


@pytest.mark.parametrize("name", [*REAL, "echo"])
def test_explain_takes_images_at_once_and_the_map_stays_as_it_was(models, name):
    """A map made three images at a time is the map made at the method's own chunk, to rounding, and keeps to three."""
    model, image = models["clip"], np.random.default_rng(0).random((32, 32), np.float32)

    def made(chunk=None):
        return explain_image(model, image, TARGET, name, 0, pytest.fail, chunk).relevance

    whole, seen = made(), []
    block = model.hf.vision_model.encoder.layers[0]
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    torch.testing.assert_close(made(3), whole, atol=1e-5, rtol=1e-3)
    hook.remove()
    assert max(seen, default=1) <= 3


def test_fewer_than_one_image_at_once_is_refused_before_the_work(models, capsys):
    """A chunk of 0 is refused with the name of the flag, by `explain` and by `iq`."""
    with pytest.raises(UsageError, match="--chunk: is 0"):
        explain_image(models["clip"], np.zeros((32, 32), np.float32), TARGET, "lime", 0, pytest.fail, 0)
    assert main(["iq", "no-such-model", "--chunk", "0"]) == 2
    assert "--chunk: is 0" in capsys.readouterr().err
