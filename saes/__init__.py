"""Sparse autoencoders: training, evaluation, naming, gallery. The only package that imports sae_lens.

Importing this package does not import sae_lens (5 s); training does, reading a trained dictionary does not.
"""

from saes.config import BatchTopKConfig, SAEConfig, TopKConfig
from saes.dictionary import JumpReLU, ReLU, SparseDictionary, TopK
from saes.folder import load_sae
from saes.metrics import Evaluation, dead, evaluate, frequency, l0, r2
from saes.null import untrained
from saes.train import train_sae

__all__ = [
    "BatchTopKConfig",
    "Evaluation",
    "JumpReLU",
    "ReLU",
    "SAEConfig",
    "SparseDictionary",
    "TopK",
    "TopKConfig",
    "dead",
    "evaluate",
    "frequency",
    "l0",
    "load_sae",
    "r2",
    "train_sae",
    "untrained",
]
