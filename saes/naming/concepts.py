"""What a feature can be called: attributes of the data folder, and phrases that the model's own text tower reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from mechinterp.data import ImageData
from mechinterp.models import HookedVLM
from mechinterp.types import Target

__all__ = ["Concept", "Phrase", "attribute_concepts", "attribute_of", "enough", "phrases", "read_concepts"]

LEAST = 10  # images with the concept, and without it, that each side of the split needs

VOCABULARY = (  # each line: words for one thing; one of them is asked
    ("consolidation", "airspace opacity", "lung opacity"),
    ("pulmonary edema", "edema", "vascular congestion"),
    ("pleural effusion", "effusion"),
    ("cardiomegaly", "an enlarged heart"),
    ("a lung nodule", "lung nodule", "nodule"),
    ("a lung mass", "mass"),
    ("a chest drain", "chest drain", "a chest tube"),
    ("a central line", "central line", "a central venous catheter"),
    ("a pacemaker", "pacemaker"),
    *((words,) for words in ("pneumonia", "infiltration", "atelectasis", "pneumothorax", "emphysema", "fibrosis")),
    *((words,) for words in ("pleural thickening", "a hiatal hernia", "a rib fracture", "scoliosis", "calcification")),
    *((words,) for words in ("ecg leads", "an endotracheal tube", "a nasogastric tube", "a prosthetic valve")),
    *((words,) for words in ("sternal wires", "surgical clips", "no finding")),
)
_PAIRS = (  # (name, prompt, the prompt it is held against, attribute it says the same as)
    ("ap view", "an ap chest x-ray", "a pa chest x-ray", r"^(view|projection)(=ap)?$"),
    ("portable", "a portable chest x-ray", "a chest x-ray", r"^portable\b"),
    ("supine", "a supine chest x-ray", "an upright chest x-ray", r"^(position|supine)(=supine)?$"),
    ("a man", "a chest x-ray of a man", "a chest x-ray of a woman", r"^(sex|gender)=(m|male)$"),
    ("old", "a chest x-ray of an old person", "a chest x-ray of a young person", r"^age>"),
    ("an old man", "a chest x-ray of an old man", "a chest x-ray of a young man", r"^age>"),
)
_SMALL_WORDS = frozenset("a an of the with no".split())


@dataclass(frozen=True, eq=False)
class Concept:
    """A name on offer, with what is known of it in each of the n images that were run.

    Fields:
        name: what a feature would be called.
        column: the metadata column it comes from, "report" or "text".
        kind: finding, acquisition, demographic, other, "report" or "text".
        values: 1, 0, or nan where nothing is known.
        labelled: True when the metadata or the reports say so; False when it is the model's own reading of the image.
    """

    name: str
    column: str
    kind: str
    values: Float[np.ndarray, " n"]
    labelled: bool = True

    @property
    def known(self) -> Bool[np.ndarray, " n"]:
        """Where there is a value."""
        return np.isfinite(self.values)


@dataclass(frozen=True)
class Phrase:
    """Words that a dual encoder is asked about: two prompts, and the attribute that means the same, if there is one.

    A feature is aligned with the difference of the prompts, so that what both share ("a chest x-ray") plays no part.
    """

    name: str
    target: Target
    attribute: str | None = None


def attribute_concepts(
    data: ImageData, rows: Sequence[int] | np.ndarray, test: Bool[np.ndarray, " n"]
) -> list[Concept]:
    """Every attribute with at least ten images of each value on both sides of the split, for the images `rows`."""
    made = [Concept(a.name, a.column, a.kind, a.values[np.asarray(rows)].astype(np.float64)) for a in data.attributes]
    return [concept for concept in made if enough(concept.values, test)]


def phrases(model: HookedVLM, data: ImageData) -> list[Phrase]:
    """What the text tower can be asked: the targets of the data folder, then a vocabulary of chest radiography.

    A phrase is asked only when the tokenizer knows each of its words, and once: of two that mean the same attribute
    the first stands, so that synonyms do not compete.
    """
    offered = [
        Phrase(_unprompted(target), target, data.target_attribute(name)) for name, target in data.targets.items()
    ]
    for synonyms in VOCABULARY:
        asked = [Target(w, f"a chest x-ray with {w}", f"a chest x-ray without {w}") for w in synonyms]
        made = [Phrase(t.name, t, attribute_of(synonyms, data)) for t in asked if _readable(model, t)]
        taken = any(_words(words) == _words(other.name) for words in synonyms for other in offered)
        offered += [] if taken else made[:1]
    for name, positive, negative, pattern in _PAIRS:
        same = next((a.name for a in data.attributes if re.search(pattern, a.name.lower())), None)
        target = Target(name, positive, negative)
        offered += [Phrase(name, target, same)] if _readable(model, target) else []
    kept: dict[str, Phrase] = {}
    for phrase in offered:
        if _readable(model, phrase.target):
            kept.setdefault(phrase.attribute or phrase.name, phrase)
    return list(kept.values())


def read_concepts(
    asked: Sequence[Phrase], scores: Float[np.ndarray, "n phrase"], test: Bool[np.ndarray, " n"]
) -> list[Concept]:
    """For each phrase without an attribute, what the model itself reads: does it prefer the prompt with or without?

    Where it (nearly) always prefers the same prompt, as an uncalibrated encoder may, the line is the upper quartile of
    its scores on train and val patients instead.
    """
    made = []
    for phrase, score in zip(asked, scores.T, strict=True):
        if phrase.attribute is not None:
            continue
        values = (score > 0).astype(np.float64)
        if not enough(values, test):
            values = (score > np.quantile(score[~test], 0.75)).astype(np.float64)
        made.append(Concept(phrase.name, "text", "text", values, labelled=False))
    return [concept for concept in made if enough(concept.values, test)]


def enough(values: Float[np.ndarray, " n"], test: Bool[np.ndarray, " n"]) -> bool:
    """Whether both sides of the split hold ten images with, and ten without."""
    return all(int((values[side] == v).sum()) >= LEAST for side in (test, ~test) for v in (0, 1))


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower().replace("_", " "))) - _SMALL_WORDS


def attribute_of(synonyms: Sequence[str], data: ImageData) -> str | None:
    """The attribute whose words are all in a phrase, or hold all of it: "pulmonary edema", `findings:Edema`."""
    for attribute in data.attributes:
        value = attribute.name.removeprefix(f"{attribute.column}:")
        theirs = _words(value)
        if not theirs or "=" in value or ">" in value:
            continue
        if any(theirs <= _words(phrase) or _words(phrase) <= theirs for phrase in synonyms):
            return attribute.name
    return None


def _unprompted(target: Target) -> str:
    """What a target's prompt is about: the words after "with", else its name."""
    _, found, words = target.positive.partition(" with ")
    return words if found else target.name.replace("_", " ")


def _readable(model: HookedVLM, target: Target) -> bool:
    """Whether the tokenizer knows every word of both prompts."""
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    texts = [text for text in (target.positive, target.negative) if text is not None]
    ids = model.tokenizer(texts)["input_ids"]
    # tokenizers of the CLIP kind pad or end with the unknown token, but hold no unknown words
    byte_level = len(model.tokenizer) > 20_000
    return unknown is None or byte_level or not any(unknown in row for row in ids)
