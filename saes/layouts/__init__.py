"""Other people's dictionaries: read from the layouts of sae-lens, dictionary_learning and saev, written as our own.

`import_dictionary` turns a folder or file into a folder that `saes.load_sae` opens; `export_dictionary_learning`
writes a dictionary folder the other way. Pickled files (`.pt`) are opened by a separate, short-lived process only.
"""

from saes.layouts.exporting import export_dictionary_learning
from saes.layouts.importing import LAYOUTS, import_dictionary

__all__ = ["LAYOUTS", "export_dictionary_learning", "import_dictionary"]
