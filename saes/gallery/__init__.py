"""The catalogue and gallery of a dictionary's features: one page, one table. See `saes.gallery.build`."""

from saes.gallery.build import Catalogue, catalogue

__all__ = ["Catalogue", "catalogue"]
