"""iq-text: a neutral word that follows the output, at test time only.

1. Small transformers (several seeds) read synthetic radiology captions of 13 words after a stamp word, and say whether
   cardiomegaly is described as present ("without cardiomegaly" counts as absent). In training the stamp is one of two
   words at random, its vector moved at random too: it means nothing.
2. At test time the stamp follows the output: its vector gets psi * z + noise of its own length along a fixed direction;
   or the stamp is one word where the output says "present" and the other where not.
3. R, F, IS and companions before and after, for every explainer of words, plain, under RBP, under an exaggerated RBP,
   and under bounds. Explainers remove words to an unknown word; F is scored against the vocabulary's mean vector and
   against words of other captions.
4. The same before and after, plain, when explainers remove words to a neutral word, which stands in every caption.

About 6 CPU minutes on one core.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp.data.phantom import Phantom
from mechinterp.experiments.iq_judges import left_out_note
from mechinterp.experiments.iq_page import Layout, injection_result
from mechinterp.experiments.iq_references import Second
from mechinterp.experiments.iq_toys import ANCHORS, CIRCULAR, Toy, dealt, explainers_for, fit, following, toy_study
from mechinterp.experiments.iq_toys import Sizes as ToySizes
from mechinterp.experiments.result import Result
from mechinterp.explain.ask import about_function
from mechinterp.explain.inject import Injected, scale_of
from mechinterp.explain.question import Question, Values
from mechinterp.metrics.faithfulness import refilled
from mechinterp.metrics.iq import expected_absolute_r

__all__ = ["Corpus", "Reader", "Sizes", "corpus", "run", "stamp_follows", "stamped", "toy_of"]

WORDS, LENGTH = 13, 14  # a stamp comes first
UNKNOWN, STAMPS, FIRST_WORD = 0, (1, 2), 3
FACTOR, NEUTRAL = "cardiomegaly", "chest"  # every caption is of a chest
D, HEADS = 16, 2
NONE, STAMP, CONTROL = "no injection", "stamp word", "shuffled"
LOST, COMMON = "the unknown word", f"the word {NEUTRAL}"


@dataclass(frozen=True)
class Sizes(ToySizes):
    """How much of everything."""

    captions: int = 20_000


QUICK = Sizes(captions=3000, rows=5, seeds=1, draws=3, steps=60, psi=(0.8,), few=True)


@dataclass(frozen=True)
class Corpus:
    """Captions of one length as word numbers, their labels, and the vocabulary. The last fifth is for testing."""

    words: Int[Tensor, "caption word"]
    label: Float[Tensor, " caption"]
    vocabulary: tuple[str, ...]

    @property
    def fit(self) -> int:
        """How many captions are for training."""
        return 4 * len(self.words) // 5


def corpus(n: int, seed: int) -> Corpus:
    """Captions of `n` phantom patients, those of 13 words."""
    phantom = Phantom.sample(n, seed=80_000 + seed)
    present = phantom.factors[FACTOR].to_numpy()
    texts = [text.split() for text in phantom.captions()]
    kept = [i for i, text in enumerate(texts) if len(text) == WORDS]
    vocabulary = sorted({word for i in kept for word in texts[i]})
    number = {word: FIRST_WORD + k for k, word in enumerate(vocabulary)}
    words = torch.tensor([[number[word] for word in texts[i]] for i in kept])
    label = torch.tensor([float(present[i] == 1) for i in kept])
    return Corpus(words, label, ("unknown", "stamp a", "stamp b", *vocabulary))


class Reader(nn.Module):
    """One transformer block, the mean over words, two linear layers. It reads vectors of words."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.table, self.place = nn.Embedding(vocabulary, D), nn.Parameter(0.3 * torch.randn(LENGTH, D))
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.hidden, self.last = nn.Linear(D, D), nn.Linear(D, 1)

    def features(self, vectors: Float[Tensor, "row word d"]) -> Float[Tensor, "row word d"]:
        """Words after the block; what Grad-CAM reads."""
        x = vectors + self.place
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = (q @ k.transpose(-1, -2) / (D // HEADS) ** 0.5).softmax(-1) @ v
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())

    def read(self, features: Float[Tensor, "row word d"]) -> Float[Tensor, " row"]:
        """The logit of "present"."""
        return self.last(self.hidden(features.mean(1)).relu())[:, 0]

    def forward(self, vectors: Float[Tensor, "row word d"]) -> Float[Tensor, " row"]:
        """The logit of "present"."""
        return self.read(self.features(vectors))


class _Training(nn.Module):
    """Word numbers in; some words unknown, the stamp's vector moved at random."""

    def __init__(self, reader: Reader, generator: torch.Generator):
        super().__init__()
        self.reader, self.generator = reader, generator

    def forward(self, words: Int[Tensor, "row word"]) -> Float[Tensor, " row"]:
        lost = torch.rand(words.shape, generator=self.generator) < 0.05
        vectors = self.reader.table(words.masked_fill(lost, UNKNOWN))
        step = torch.randn(len(words), D, generator=self.generator) / D**0.5
        length = vectors[:, :1].norm(dim=-1, keepdim=True)
        moved = vectors[:, :1] + length * step[:, None]
        return self.reader(torch.cat([moved, vectors[:, 1:]], dim=1))


def stamped(words: Int[Tensor, "row 13"], generator: torch.Generator) -> Int[Tensor, "row 14"]:
    """Captions after one of the two stamps at random."""
    stamp = torch.randint(STAMPS[0], STAMPS[1] + 1, (len(words), 1), generator=generator)
    return torch.cat([stamp, words], dim=1)


def toy_of(found: Corpus, seed: int, size: Sizes) -> Toy:
    """A trained reader and test captions with a stamp at random."""
    torch.manual_seed(90_000 + seed)
    reader = Reader(len(found.vocabulary))

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        at = torch.randint(found.fit, (n,), generator=generator)
        return stamped(found.words[at], generator), found.label[at]

    fit(_Training(reader, torch.Generator().manual_seed(seed)), draw, seed, size.steps, rate=1e-2)
    generator = torch.Generator().manual_seed(91_000 + seed)
    tests = torch.arange(found.fit, len(found.words))
    tests = tests[torch.randperm(len(tests), generator=generator)]
    table = reader.table.weight.detach()
    many = table[stamped(found.words[tests], generator)]
    skill = float(((reader(many) > 0) == (found.label[tests] > 0.5)).float().mean())
    owner = torch.arange(LENGTH)[:, None]

    def inner(values: Values) -> tuple[Tensor, Tensor]:
        features = reader.features(values[0]).requires_grad_()
        return features, reader.read(features)

    def about(vectors: Tensor, reference: Tensor) -> Question:
        return about_function(reader, vectors, reference.expand(LENGTH, D), owner, "word", None, inner)

    rows = many[: size.rows]
    question = about(rows, table[UNKNOWN])
    judges = {
        "the mean vector": about(rows, table[FIRST_WORD:].mean(0)),
        "other captions": refilled(question, "resample", torch.Generator().manual_seed(92_000 + seed)),
    }
    neutral = about(rows, table[found.vocabulary.index(NEUTRAL)])
    return Toy(question, judges, 0, scale_of(about(many, table[UNKNOWN])), skill, Second(COMMON, neutral, judges))


def stamp_follows(toy: Toy, near: Question, seed: int) -> Injected:
    """One stamp where the output says "present", the other where it does not."""
    before = near.score()
    stamps = toy.question.values[0][:, 0].unique(dim=0)[[0, -1]]  # the vectors of both stamps
    vectors = near.values[0].clone()
    vectors[:, 0] = stamps[(before > 0).long()]
    changed = near.at((vectors,))
    return Injected(changed, changed.score() - before, toy.scale.sd)


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    size = sizes or (QUICK if quick else Sizes())
    found = corpus(size.captions, seed)
    toys = [toy_of(found, seed * 100 + s, size) for s in range(size.seeds)]
    conditions = {NONE: None, **{f"psi {p:g}": following(p) for p in size.psi}, STAMP: stamp_follows}
    conditions[CONTROL] = dealt(max(size.psi))
    strongest = f"psi {max(size.psi):g}"
    explainers = explainers_for(toys[0].question, size.few)
    study = toy_study(toys, conditions, (NONE, strongest, STAMP), explainers, size.draws, seed, (NONE, strongest))
    anchors = tuple(n for n in ANCHORS if n in explainers)
    real = tuple(n for n in explainers if n not in anchors)
    line = ((NONE, 0.0), *((f"psi {p:g}", p) for p in size.psi))
    layout = Layout(
        NONE, strongest, line, real, anchors, "the injected word", CIRCULAR, (STAMP,), CONTROL, (LOST, COMMON)
    )
    skills = [toy.skill for toy in toys]
    notes = [
        f"Captions classified rightly, not trained on: {min(skills):.2f} to {max(skills):.2f} over {len(skills)} seeds "
        f"({len(found.words)} captions of {WORDS} words, {float(found.label.mean()):.0%} with {FACTOR}).",
        f"R by chance with {size.draws} draws: {expected_absolute_r(size.draws):.3f}.",
        "F is scored by removing single words to the mean vector ('by other captions': to the word in that place of "
        "another caption). occlusion removes single words too, to the unknown word, so claims about F leave "
        "it out; oracle is the same thing as an anchor.",
    ]
    notes.append(left_out_note([(toy.question, toy.scale.sd) for toy in toys], seed))
    return injection_result(study, layout, notes)
