"""Names for features, chosen on train and val patients and proven on test patients; see `saes.naming.names`."""

from saes.naming.alignment import alignment, standardised
from saes.naming.concepts import Concept, Phrase, attribute_concepts, phrases, read_concepts
from saes.naming.names import LEAST_AUROC, UNNAMED, Name, Naming, name_features
from saes.naming.twin import random_twin

__all__ = [
    "LEAST_AUROC",
    "UNNAMED",
    "Concept",
    "Name",
    "Naming",
    "Phrase",
    "alignment",
    "attribute_concepts",
    "name_features",
    "phrases",
    "random_twin",
    "read_concepts",
    "standardised",
]
