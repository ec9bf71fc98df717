"""Sparse autoencoders and transcoders: training, evaluation, nulls, naming, gallery. Only here sae_lens is imported.

Importing this package does not import sae_lens (5 s), nor does training or reading a dictionary.

`engine` is the training step, `metrics` what dictionaries are judged by, `nulls` what has learnt nothing, `scorecard`
the two side by side, `naming` and `gallery` the catalogue of features, `layouts` other people's files, `truth` what the
phantom and toy models know.
"""

from saes.config import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    SAEConfig,
    TopKConfig,
    TrainConfig,
    TranscoderConfig,
)
from saes.dictionary import Gated, JumpReLU, ReLU, SparseDictionary, TopK
from saes.folder import load_sae
from saes.layouts import export_dictionary_learning, import_dictionary
from saes.metrics import Evaluation, dead, evaluate, frequency, l0, r2
from saes.null import untrained
from saes.sweep import Sweep, train_sweep
from saes.tokens import rows_for
from saes.train import train_sae, train_transcoder
from saes.transcoder import export_transcoder

__all__ = [
    "BatchTopKConfig",
    "Evaluation",
    "Gated",
    "GatedConfig",
    "JumpReLU",
    "JumpReLUConfig",
    "MatryoshkaConfig",
    "ReLU",
    "SAEConfig",
    "SparseDictionary",
    "Sweep",
    "TopK",
    "TopKConfig",
    "TrainConfig",
    "TranscoderConfig",
    "dead",
    "evaluate",
    "export_dictionary_learning",
    "export_transcoder",
    "frequency",
    "import_dictionary",
    "l0",
    "load_sae",
    "r2",
    "rows_for",
    "train_sae",
    "train_sweep",
    "train_transcoder",
    "untrained",
]
