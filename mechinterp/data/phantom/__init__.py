"""A synthetic chest radiograph with truth."""

from mechinterp.data.phantom.factors import DETAILS, FACTORS, Factor
from mechinterp.data.phantom.folder import dataset_description
from mechinterp.data.phantom.language import MENTIONED, VOCABULARY, mentions, prompts
from mechinterp.data.phantom.phantom import Phantom, question_answers

__all__ = [
    "DETAILS",
    "FACTORS",
    "MENTIONED",
    "VOCABULARY",
    "Factor",
    "Phantom",
    "dataset_description",
    "mentions",
    "prompts",
    "question_answers",
]
