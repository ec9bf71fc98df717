"""How a medical vision-language model reasons: features, interventions, explanations, audit.

`import mechinterp` does no work. Import what you need from the rooms:

    from mechinterp.models import HookedVLM
    from mechinterp.data import open_data
    from mechinterp.audit import audit
"""

__version__ = "0.1.0"
