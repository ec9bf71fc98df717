"""The activation store: write once, read many times. `format.md` in this folder is the normative file format."""

from mechinterp.activations.extract import extract, store_folder
from mechinterp.activations.store import ActivationStore, SiteActivations

__all__ = ["ActivationStore", "SiteActivations", "extract", "store_folder"]
