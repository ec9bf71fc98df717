"""The planted circuit in the terms it was written in: concepts, neurons that read and write them, heads that move them.

A patch may hold the textures lesion, border, marker, effusion and some distractors. Four blocks' worth of mechanism in
three blocks:

    block 0  every position   a detector for each texture
    block 1  heads            the class token gathers the detectors of all patches (one head for each of lesion, border
                              and marker; one for effusion and the distractors)
             class token      conjunction = lesion and border; marker neuron, which writes the pneumonia logit by itself
                              (the shortcut); opacity; effusion; distractors
    block 2  class token      diagnosis (from the conjunction) writes the pneumonia logit; atelectasis competes: opacity
                              raises it, the conjunction suppresses it; effusion; distractors write what nobody reads

Distractors are active and take part in many edges, but no path leads from them to a logit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mechinterp.errors import UsageError

__all__ = ["CLASSES", "FINDINGS", "THRESHOLD", "Circuit", "Head", "Neuron"]

CLASSES = ("pneumonia", "atelectasis", "effusion")
FINDINGS = ("lesion", "border", "marker", "effusion")
THRESHOLD = 0.3
"""The logit above which a class is called present, on images as `PlantedModel.random_amounts` makes them."""


@dataclass(frozen=True)
class Neuron:
    """`relu(sum of reads + bias)`, times what it writes, at every position of block `layer`."""

    name: str
    layer: int
    reads: Mapping[str, float]
    bias: float
    writes: Mapping[str, float]


@dataclass(frozen=True)
class Head:
    """The class token attends to all patches alike and patches to the class token; `moves` maps concept to concept.

    `follows`: a concept whose patches the class token attends to more, `sharpness` in units of the score for each unit
    of the concept. Then the pattern depends on the image, and a graph with the pattern held misses that.
    """

    index: int
    layer: int
    moves: Mapping[str, tuple[str, float]]
    follows: str | None = None
    sharpness: float = 0.0


@dataclass(frozen=True)
class Circuit:
    """What is planted. `distractors`: how many irrelevant textures; `follows`: the lesion head looks for lesions."""

    distractors: int = 6
    follows: bool = False
    layers: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.distractors <= 32:
            raise UsageError(f"{self.distractors} distractors", hint="0 to 32 fit into the pixels of a patch")

    @cached_property
    def textures(self) -> tuple[str, ...]:
        """What a patch can hold."""
        return (*FINDINGS, *(f"distractor{i}" for i in range(self.distractors)))

    @cached_property
    def neurons(self) -> tuple[Neuron, ...]:
        """All neurons, in no order that matters."""
        found = [Neuron(f"detect {t}", 0, {t: 1.0}, -0.1, {f"{t} found": 1.0}) for t in self.textures]
        found += [
            Neuron("conjunction", 1, {"lesion seen": 1.0, "border seen": 1.0}, -0.55, {"conjunction": 4.0}),
            Neuron("marker", 1, {"marker seen": 1.0}, -0.05, {"logit pneumonia": 1.8}),
            Neuron("opacity", 1, {"lesion seen": 1.2}, -0.05, {"opacity": 1.0}),
            Neuron("effusion", 1, {"effusion seen": 1.0}, -0.05, {"effusion": 1.0}),
            Neuron("diagnosis", 2, {"conjunction": 1.0}, -0.02, {"logit pneumonia": 2.0}),
            Neuron("competitor", 2, {"opacity": 1.0, "conjunction": -0.6}, -0.02, {"logit atelectasis": 2.0}),
            Neuron("fluid", 2, {"effusion": 1.3}, -0.02, {"logit effusion": 2.0}),
        ]
        for t in self.textures[len(FINDINGS) :]:
            found.append(Neuron(f"gather {t}", 1, {f"{t} seen": 1.0}, -0.02, {f"{t} gathered": 1.0}))
            found.append(Neuron(f"waste {t}", 2, {f"{t} gathered": 1.0, f"{t} seen": 0.5}, -0.02, {"waste": 1.0}))
        return tuple(found)

    @cached_property
    def heads(self) -> tuple[Head, ...]:
        """The four heads of block 1."""
        rest = ("effusion", *self.textures[len(FINDINGS) :])
        return (
            Head(0, 1, {"lesion found": ("lesion seen", 0.8)}, "lesion found", 6.0)
            if self.follows
            else Head(0, 1, {"lesion found": ("lesion seen", 6.0)}),
            Head(1, 1, {"border found": ("border seen", 6.0)}),
            Head(2, 1, {"marker found": ("marker seen", 8.0)}),
            Head(3, 1, {f"{t} found": (f"{t} seen", 6.0) for t in rest}),
        )

    @cached_property
    def concepts(self) -> tuple[str, ...]:
        """Every concept that something reads or writes; the first two mark the class token and the patches."""
        names = ["is class token", "is patch", *self.textures]
        for neuron in self.neurons:
            names += [*neuron.reads, *neuron.writes]
        names += [concept for head in self.heads for concept, _ in head.moves.values()]
        return tuple(dict.fromkeys([*names, *(f"logit {c}" for c in CLASSES)]))

    def neurons_of(self, layer: int) -> tuple[Neuron, ...]:
        """The neurons of a block."""
        return tuple(n for n in self.neurons if n.layer == layer)
