"""Names are right where the answer is known, absent where there is none, and chosen without the test patients."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mechinterp.data import open_data
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Target
from saes.dictionary import ReLU, SparseDictionary, TopK
from saes.naming import (
    UNNAMED,
    Concept,
    Phrase,
    alignment,
    attribute_concepts,
    name_features,
    phrases,
    random_twin,
    read_concepts,
    standardised,
)
from saes.naming.association import associate, rivals
from saes.naming.minilm import encoder, said_in
from saes.naming.names import LEAST_AUROC, _live
from saes.naming.proof import auroc_draws
from tests.tiny_models import tiny

WORDS = ["there", "is", "no", "pneumonia", "the", "bones", "are", "intact"]

N = 400


def cohort(seed: int = 0):
    """Three findings and a drain that goes with the second; two images a patient, two patients of five for testing."""
    rng = np.random.default_rng(seed)
    a, b, c = (rng.integers(0, 2, N).astype(float) for _ in range(3))
    drain = np.where(rng.random(N) < 0.85, b, 1 - b)
    patients = np.array([f"p{i // 2}" for i in range(N)])
    test = (np.arange(N) // 2) % 5 < 2
    concepts = [
        Concept(name, name, "finding", values) for name, values in (("a", a), ("b", b), ("c", c), ("drain", drain))
    ]
    return concepts, patients, test, rng


def answering(values: np.ndarray, rng: np.random.Generator, strength: float = 2.0) -> np.ndarray:
    """A feature that fires for `values`."""
    return np.maximum(strength * values + rng.normal(0, 0.7, len(values)) - 0.4, 0).astype(np.float32)


def noise(width: int, rng: np.random.Generator) -> np.ndarray:
    return np.maximum(rng.normal(0, 1, (N, width)), 0).astype(np.float32)


def test_planted_features_get_their_names():
    concepts, patients, test, rng = cohort()
    signal = np.column_stack(
        [
            *(answering(c.values, rng) for c in concepts),
            answering(1 - concepts[0].values, rng),
            noise(3, rng),
            np.zeros(N, np.float32),
        ]
    )
    naming = name_features(signal, concepts, patients, test, noise(100, rng), noise(100, rng))
    names = [name.name for name in naming.names]
    assert names == ["a", "b", "c", "drain", "not a", UNNAMED, UNNAMED, UNNAMED]  # the ninth never fires
    for name in naming.named:
        assert name.ci95[0] < name.auroc < name.ci95[1] and name.auroc > 0.9 and name.q < 0.01
        assert name.precision > 0.9 and name.beats == 1
    assert naming.decoys == 100 and naming.decoys_named <= 6


def test_a_confounded_name_is_not_given():
    """A drain's feature follows the finding that drains are put in for; at equal drain it does not."""
    concepts, patients, test, rng = cohort()
    drain = answering(concepts[3].values, rng)[:, None]
    fixed = rivals(concepts, ~test)
    assert fixed[1] == [3] and fixed[3] == [1]
    found = associate(drain, concepts, ~test, fixed)
    assert found.plain[1, 0] > 0.25 and abs(found.within[1, 0]) < 0.08
    name = name_features(drain, concepts, patients, test, noise(100, rng)).names[0]
    assert name.name == "drain" and name.rival in ("", "b")


def test_a_random_dictionary_is_mostly_unnamed():
    """Also where the images have directions that answer to the concepts, as every random direction does a little."""
    concepts, patients, test, rng = cohort()
    x = np.column_stack([c.values for c in concepts])

    def random_directions(width):
        return np.maximum(x @ rng.normal(0, 0.5, (4, width)) + rng.normal(0, 1, (N, width)), 0).astype(np.float32)

    naming = name_features(random_directions(120), concepts, patients, test, random_directions(400))
    assert len(naming.names) > 100
    assert len(naming.named) <= 0.1 * len(naming.names)


def test_names_are_chosen_without_the_test_patients():
    """On train the feature follows a, on test patients b, and more so: looking at them would change the proposal."""
    concepts, patients, test, rng = cohort()
    a, b = concepts[0].values, concepts[1].values
    signal = np.where(test, answering(b, rng, 9.0), answering(a, rng, 1.5))[:, None]
    everybody = associate(signal, concepts, np.ones(N, bool), rivals(concepts, ~test))
    assert np.abs(everybody.within[:, 0]).argmax() == 1  # so the test can fail
    null = noise(100, rng)
    name = name_features(signal, concepts, patients, test, null).names[0]
    assert name.proposal == "a"
    assert name.name == UNNAMED and abs(name.auroc - 0.5) < 0.1

    # whatever the test patients are, the proposals stay
    planted = np.column_stack([answering(c.values, rng) for c in concepts] + [noise(20, rng)])
    first = name_features(planted, concepts, patients, test, null)
    shuffled = planted.copy()
    shuffled[test] = rng.permutation(shuffled[test])
    second = name_features(shuffled, concepts, patients, test, null)
    assert [n.proposal for n in first.names] == [n.proposal for n in second.names]
    assert [n.fit for n in first.names] == pytest.approx([n.fit for n in second.names], nan_ok=True)
    assert len(first.named) == 4 and not second.named


def test_held_out_auroc_at_chance_means_unnamed():
    concepts, patients, test, rng = cohort()
    signal = np.where(test, noise(1, rng)[:, 0], answering(concepts[2].values, rng))[:, None]
    name = name_features(signal, concepts, patients, test, noise(100, rng)).names[0]
    assert name.proposal == "c" and name.fit > 0.9
    assert name.name == UNNAMED and name.q > 0.05 and name.nearest == "c" and abs(name.nearest_auroc - 0.5) < 0.1


def test_text_names_only_what_no_attribute_names():
    concepts, patients, test, rng = cohort()
    reading = Concept("a rib fracture", "text", "text", rng.integers(0, 2, N).astype(float), labelled=False)
    concepts = [*concepts, reading]
    signal = np.column_stack([answering(reading.values, rng), answering(concepts[0].values, rng), noise(1, rng)])
    said = np.full((3, 5), np.nan)
    said[:, 4] = 9.0
    names = name_features(signal, concepts, patients, test, noise(100, rng), said=said).names
    assert (names[0].name, names[0].source) == ("a rib fracture", "text")
    assert (names[1].name, names[1].source, names[1].said) == ("a", "attribute", "a rib fracture")
    assert names[2].name == UNNAMED
    said[:, 4] = -9.0  # the text tower says the opposite of where the feature fires
    assert name_features(signal, concepts, patients, test, noise(100, rng), said=said).names[0].name == UNNAMED


def test_a_perfect_feature_is_named():
    """Its AUROC is 1 in every draw, so that the bootstrap gives no standard error."""
    concepts, patients, test, rng = cohort()
    signal = (1.0 + concepts[0].values).astype(np.float32)[:, None]
    name = name_features(signal, concepts, patients, test, noise(100, rng)).names[0]
    assert name.name == "a" and name.auroc == 1 and name.q < 1e-6


def test_missing_values_and_nothing_on_offer():
    concepts, patients, test, rng = cohort()
    values = concepts[0].values.copy()
    values[::7] = np.nan
    signal = np.column_stack([answering(concepts[0].values, rng)])
    gaps = [Concept("a", "a", "finding", values), *concepts[1:]]
    assert name_features(signal, gaps, patients, test, noise(50, rng)).names[0].name == "a"
    assert name_features(signal, [], patients, test, noise(50, rng)).names[0].name == UNNAMED
    assert not _live(np.zeros((N, 2)), test).any()


def test_draws_are_those_of_repeated_images():
    rng = np.random.default_rng(3)
    scores, truth, strata = rng.normal(size=40).round(1), rng.integers(0, 2, 40).astype(float), rng.integers(0, 2, 40)
    weights = rng.integers(0, 3, (5, 40)).astype(float)
    plain, draws = auroc_draws(scores, truth, strata, np.vstack([np.ones((1, 40)), weights]))
    assert draws[0] == pytest.approx(plain)
    for row, draw in zip(weights.astype(int), draws[1:], strict=True):
        again = np.repeat(np.arange(40), row)
        assert draw == pytest.approx(
            auroc_draws(scores[again], truth[again], strata[again], np.ones((1, len(again))))[0]
        )


# ------------------------------------------------------------------------------------------------------ text tower


@pytest.fixture(scope="module")
def clip():
    hf, processor = tiny("clip", seed=1)
    return HookedVLM(hf, processor, name="toy")


ASKED = [Target(w, f"a chest x-ray with {w}", f"a chest x-ray without {w}") for w in ("pneumonia", "effusion", "drain")]


def test_alignment_finds_the_words_a_feature_was_made_for(clip):
    """Each feature writes the gradient of one phrase's score, at the class token of the last block but one."""
    site = "vision.blocks.1.hook_resid_post"
    pixels = np.random.default_rng(0).random((12, 32, 32)).astype(np.float32)
    batch = clip.preprocess(pixels, ids=[str(i) for i in range(12)])
    value = clip.run_with_cache(batch, names_filter=site)[1][site].detach()
    rows = []
    for target in ASKED:
        moved = value.clone().requires_grad_(True)
        clip.run_from(site, moved, batch, [target]).sum().backward()
        assert moved.grad is not None
        rows.append(moved.grad[:, 0].mean(0))
    wanted = torch.stack(rows)
    # what distinguishes each phrase: the part of its gradient that the others do not share
    directions = torch.linalg.pinv(wanted).T
    decoder = 0.2 * directions / directions.norm(dim=1, keepdim=True)
    decoder = torch.cat([decoder, -decoder[:1]])
    width = len(decoder)
    dictionary = SparseDictionary(
        torch.zeros(decoder.shape[1], width), decoder, torch.ones(width), torch.zeros(decoder.shape[1]), ReLU()
    )
    found = alignment(clip, Placed.sae(dictionary, site), batch, ASKED, range(width), tokens="cls")
    assert np.abs(found).argmax(1).tolist() == [0, 1, 2, 0]
    assert (np.diag(found[:3]) > 0).all() and found[3, 0] < 0
    assert (np.abs(standardised(found))[:3] >= 0).all()


def test_alignment_says_nothing_of_features_that_are_silent(clip):
    pixels = np.random.default_rng(0).random((4, 32, 32)).astype(np.float32)
    batch = clip.preprocess(pixels, ids=list("abcd"))
    dictionary = SparseDictionary(
        torch.zeros(32, 2), torch.ones(2, 32), torch.tensor([1.0, -1.0]), torch.zeros(32), ReLU()
    )
    placed = Placed.sae(dictionary, "vision.blocks.1.hook_resid_post")
    found = alignment(clip, placed, batch, ASKED, [0, 1])
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten images with findings, a drain, a view and a sex."""
    root = tmp_path_factory.mktemp("naming")
    (root / "images").mkdir()
    lines = ["image,patient_id,findings,drain,view,sex"]
    for i in range(10):
        Image.fromarray(np.full((32, 32), 20 * i, np.uint8)).save(root / "images" / f"{i}.png")
        findings = ("No Finding", "Pneumonia", "Edema;Pneumonia")[i % 3]
        lines.append(f"images/{i}.png,p{i},{findings},{i % 2},{'AP' if i % 2 else 'PA'},{'M' if i % 4 else 'F'}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    prompts = {"positive": ASKED[0].positive, "negative": ASKED[0].negative}
    described = {
        "targets": {"pneumonia": {"column": "findings", "value": "Pneumonia", **prompts}},
        "findings": ["findings"],
        "acquisition": ["view", "drain"],
        "demographic": ["sex"],
    }
    (root / "dataset.json").write_text(json.dumps(described))
    return open_data(root)


def test_phrases_are_readable_and_asked_once(clip, folder):
    """The toy tokenizer knows pneumonia, effusion and drain, but neither pacemakers, edema nor men."""
    asked = {phrase.name: phrase.attribute for phrase in phrases(clip, folder)}
    assert asked["pneumonia"] == "findings:Pneumonia" and asked["a chest drain"] == "drain"
    assert asked["portable"] is None and asked["effusion"] is None
    assert not {"a pacemaker", "pulmonary edema", "edema", "a man", "chest drain"} & set(asked)
    meant = [attribute or name for name, attribute in asked.items()]
    assert len(meant) == len(set(meant))


def test_attributes_without_enough_images_are_not_on_offer(folder):
    assert attribute_concepts(folder, range(10), np.arange(10) < 5) == []
    rows = np.repeat(np.arange(10), 20)
    offered = {concept.name for concept in attribute_concepts(folder, rows, np.arange(200) % 2 == 0)}
    assert offered == {"findings:Pneumonia", "findings:Edema", "drain", "view=AP", "sex=M"}


def test_a_reading_is_the_preferred_prompt_or_the_upper_quartile():
    asked = [Phrase("x", ASKED[0]), Phrase("y", ASKED[1]), Phrase("z", ASKED[2], attribute="column")]
    test = np.arange(100) % 2 == 0
    scores = np.column_stack([np.linspace(-1, 1, 100), np.linspace(5, 6, 100), np.zeros(100)])
    first, second = read_concepts(asked, scores, test)
    assert first.values.mean() == 0.5 and not first.labelled
    assert 0.2 < second.values.mean() < 0.3


def test_reports_are_read_with_their_negations():
    """With an encoder that counts words; and with the real one, where it is installed."""
    reports = ["There is pneumonia . the bones are intact", "there is no pneumonia .", "the bones are intact", None]

    def count(texts):
        table = np.array([[text.lower().split().count(word) for word in WORDS] for text in texts], float)
        return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)

    for embed in (count, encoder()):
        if embed is not None:
            said = said_in(reports, ["pneumonia"], embed)[:, 0]
            assert said[:3].tolist() == [1, 0, 0] and np.isnan(said[3])
    assert said_in([None], ["pneumonia"], count).shape == (1, 1)
    assert said_in(reports, [], count).shape == (4, 0)


def test_the_twin_is_as_sparse_and_knows_nothing():
    rows = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) + 3
    eye = torch.eye(16)
    dictionary = SparseDictionary(eye, eye, torch.zeros(16), torch.zeros(16), TopK(5))
    one, same, other = (random_twin(dictionary, rows, seed) for seed in (1, 1, 2))
    assert torch.equal(one.W_dec, same.W_dec) and not torch.equal(one.W_dec, other.W_dec)
    assert one.W_dec.shape == (16, 16) and torch.allclose(one.W_dec.norm(dim=1), torch.ones(16))
    assert isinstance(one.activation, TopK) and one.activation.k == 5
    assert torch.allclose(one.b_dec, rows.mean(0))


def test_the_line_that_is_printed_is_the_line_that_is_drawn():
    concepts, patients, test, rng = cohort()
    signal = np.column_stack([answering(c.values, rng, s) for c in concepts for s in (0.3, 0.5, 0.8, 1.5)])
    for name in name_features(signal, concepts, patients, test, noise(100, rng)).names:
        if name.name != UNNAMED:
            assert name.within >= LEAST_AUROC and name.fit >= LEAST_AUROC and name.q < 0.05
