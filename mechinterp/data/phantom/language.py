"""What a radiologist would write about a phantom: reports, captions, questions, and a parser that scores them.

Text is lower case ASCII, words and punctuation separated by single spaces, so that splitting at spaces tokenises it.
Every present finding and device is reported; some absent findings are negated; acquisition is never mentioned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mechinterp.data.phantom._random import uniform_one
from mechinterp.data.phantom._templates import (
    ABSENT,
    CAPTION_HEADS,
    CLEAR,
    CLOSING,
    DEVICES,
    HEART_NORMAL,
    NORMAL,
    NOT_THIS,
    OPENING,
    PRESENT,
    SHORT,
    SIDES,
    ZONES,
    band,
)
from mechinterp.data.phantom.factors import FACTORS

__all__ = ["MENTIONED", "VOCABULARY", "captions", "mentions", "named", "prompts", "question_answers", "reports"]

FINDINGS = tuple(name for name, factor in FACTORS.items() if factor.kind == "finding")
MENTIONED = FINDINGS + tuple(DEVICES)
CAPTION_WORDS = 24

Row = Mapping[str, Any]


class _Chooser:
    """Choices of one image: the n-th named choice depends only on (seed, name, image), so do() changes little."""

    def __init__(self, seed: int, image: int):
        self.seed, self.image = seed, image

    def chance(self, name: str) -> float:
        return uniform_one(self.seed, f"text/{name}", self.image)

    def one(self, name: str, options: Sequence[str]) -> str:
        return options[int(self.chance(name) * len(options))]

    def shuffled(self, name: str, items: Iterable[str]) -> list[str]:
        return sorted(items, key=lambda item: self.chance(f"{name}/{item}"))


def _slots(row: Row, name: str) -> dict[str, str]:
    side = row.get(f"{name}_side")
    zone = row.get(f"{name}_zone")
    size = row.get(f"{name}_size")
    return {
        "side": "" if side is None else SIDES[int(side)],
        "zone": "" if zone is None else ZONES[int(zone)],
        "size": "" if size is None else band(name, float(size)),
    }


def _report(row: Row, seed: int) -> str:
    choose = _Chooser(seed, int(row["image"]))
    present = [name for name in FINDINGS if row[name] == 1]
    absent = [name for name in FINDINGS if row[name] != 1]
    said = [choose.one(name, PRESENT[name]).format(**_slots(row, name)) for name in present]
    devices = [choose.one(name, DEVICES[name]).format(**_slots(row, name)) for name in DEVICES if row[name] == 1]
    denied, quiet = [], set(absent)
    if "cardiomegaly" in quiet:
        quiet.discard("cardiomegaly")
        if choose.chance("heart") < 0.8:
            denied.append(choose.one("heart/words", HEART_NORMAL))
    parenchyma = {"consolidation", "edema", "nodule", "atelectasis"}
    if parenchyma <= quiet and choose.chance("clear") < 0.6:
        quiet -= parenchyma
        denied.append(choose.one("clear/words", CLEAR))
    named = [name for name in choose.shuffled("deny", quiet) if choose.chance(f"deny?/{name}") < 0.75]
    while named:
        pair, named = named[:2], named[2:]
        things = " or ".join(FACTORS[name].phrase for name in pair)
        denied.append(choose.one(f"deny/words/{pair[0]}", ABSENT).format(things=things))
    body = choose.shuffled("said", said) + choose.shuffled("denied", denied)
    if choose.chance("order") < 0.25:
        body = choose.shuffled("mixed", body)
    body = devices + body if choose.chance("devices first") < 0.4 else body + devices
    head = [choose.one("opening", OPENING)] if choose.chance("opening?") < 0.6 else []
    tail = []
    if not present:
        tail = [choose.one("normal", NORMAL)]
    elif choose.chance("closing?") < 0.2:
        tail = [choose.one("closing", CLOSING)]
    return " ".join(f"{sentence} ." for sentence in head + body + tail)


def _caption(row: Row, seed: int) -> str:
    choose = _Chooser(seed, int(row["image"]))
    present = choose.shuffled("caption", [name for name in MENTIONED if row[name] == 1])
    healthy = not any(name in FINDINGS for name in present)
    absent = [name for name in MENTIONED if row[name] != 1]

    def joined(words: list[str]) -> str:
        return " , ".join((["no acute finding"] if healthy else []) + words)

    sided = [
        f"{SIDES[int(row[f'{n}_side'])]} {FACTORS[n].phrase}" if n in _SIDED else FACTORS[n].phrase for n in present
    ]
    plain = [FACTORS[name].phrase for name in present]
    head = choose.one("head", CAPTION_HEADS)
    without = f" {NOT_THIS} {FACTORS[choose.one('without', absent)].phrase}" if absent else ""
    tries = [f"{head} {joined(sided)}", joined(sided), joined(plain), joined([SHORT[name] for name in present])]
    if choose.chance("without?") < 0.5:
        tries.insert(0, tries[0] + without)
    return next(text for text in tries if len(text.split()) <= CAPTION_WORDS)


_SIDED = ("effusion", "pneumothorax", "consolidation", "nodule", "atelectasis", "drain")


_ARTICLE: dict[str, str] = dict.fromkeys(["pneumothorax", "nodule", "drain", "pacemaker", "line"], "a ")


def reports(rows: Iterable[Row], seed: int) -> list[str]:
    """One report per row of factors."""
    return [_report(row, seed) for row in rows]


def captions(rows: Iterable[Row], seed: int) -> list[str]:
    """One caption of at most 24 words and punctuation marks per row of factors."""
    return [_caption(row, seed) for row in rows]


def prompts(name: str) -> tuple[str, str, str]:
    """(positive prompt, negative prompt, question) about a finding or device."""
    phrase = FACTORS[name].phrase
    return (
        f"a chest x-ray with {phrase}",
        f"a chest x-ray without {phrase}",
        f"are there {phrase} ?" if name == "ecg_leads" else f"is there {_ARTICLE.get(name, '')}{phrase} ?",
    )


def question_answers(rows: Iterable[Row], seed: int) -> list[list[tuple[str, str]]]:
    """Per image: as many questions answered yes as no (one no where nothing is there), and one of side."""
    out = []
    for row in rows:
        choose = _Chooser(seed, int(row["image"]))
        present = choose.shuffled("ask", [name for name in MENTIONED if row[name] == 1])[:2]
        absent = choose.shuffled("ask", [name for name in MENTIONED if row[name] != 1])[: max(1, len(present))]
        asked = [(prompts(name)[2], "yes") for name in present] + [(prompts(name)[2], "no") for name in absent]
        sided = [name for name in _SIDED if row[name] == 1]
        for name in choose.shuffled("side", sided)[:1]:
            asked.append((f"which side is the {FACTORS[name].phrase} on ?", _ANSWER[int(row[f"{name}_side"])]))
        out.append([asked[i] for i in sorted(range(len(asked)), key=lambda k: choose.chance(f"q/{k}"))])
    return out


_ANSWER = ("right", "left", "both")

_WORDS = {
    "effusion": r"effusions?|pleural fluid",
    "pneumothorax": r"pneumothorax",
    "consolidation": r"consolidation|airspace opacity",
    "nodule": r"nodule|nodules",
    "cardiomegaly": r"cardiomegaly|heart|cardiac",
    "edema": r"edema|vascular congestion",
    "atelectasis": r"atelectasis",
    "drain": r"chest drain|chest tube|drain",
    "pacemaker": r"pacemaker|pacer",
    "ecg_leads": r"ecg leads|monitoring leads|ecg electrodes",
    "line": r"central line|central venous catheter",
}
_PATTERNS = {name: re.compile(rf"\b(?:{words})\b") for name, words in _WORDS.items()}
_NEGATION = re.compile(r"\b(?:no|not|without|absent|normal|free)\b")


def named(text: str) -> dict[str, tuple[tuple[int, int], ...]]:
    """Where a text names each finding and device, affirmed or denied: (start, end) in characters of every mention."""
    return {name: tuple(m.span() for m in pattern.finditer(text.lower())) for name, pattern in _PATTERNS.items()}


def mentions(report: str) -> dict[str, int | None]:
    """What a text of this language says of each finding and device: 1 present, 0 absent, None not mentioned.

    A clause ends at a full stop, a comma, "but", "with" or before "without"; a negation holds for its clause. Said
    both ways, presence wins. "The lungs are clear" denies what would lie in the lungs; "no acute finding" denies every
    finding not named.
    """
    found: dict[str, int | None] = dict.fromkeys(MENTIONED)
    healthy = False
    for clause in re.split(r" ?[.,;?] ?|\bbut\b|\bwith\b|(?=\bwithout\b)", report.lower()):
        denied = _NEGATION.search(clause) is not None
        for name, pattern in _PATTERNS.items():
            if pattern.search(clause):
                found[name] = 1 if found[name] == 1 or not denied else 0
        if "clear" in clause and "lung" in clause:
            for name in ("consolidation", "edema", "nodule", "atelectasis"):
                found[name] = found[name] or 0
        healthy |= "acute" in clause and denied
    if healthy:
        found |= {name: found[name] or 0 for name in FINDINGS}
    return found


def _vocabulary() -> tuple[str, ...]:
    texts = [
        *OPENING,
        *CLOSING,
        *NORMAL,
        *CLEAR,
        *HEART_NORMAL,
        *ABSENT,
        *CAPTION_HEADS,
        *SHORT.values(),
        *SIDES,
        *ZONES,
    ]
    texts += [text for options in (*PRESENT.values(), *DEVICES.values()) for text in options]
    texts += [band(name, size) for name in FINDINGS for size in (0.1, 0.5, 0.9)]
    texts += [text for name in MENTIONED for text in prompts(name)]
    texts += [*_ANSWER, "yes no", "no acute finding", "which side is the on ?", ". , or", NOT_THIS]
    return tuple(sorted({word for text in texts for word in re.sub(r"\{\w+\}", " ", text).split()}))


VOCABULARY: tuple[str, ...] = _vocabulary()
"""Every word that a report, caption, prompt, question or answer can contain, sorted."""
