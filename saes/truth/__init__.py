"""Dictionaries against what is known to be true: the phantom's factors, toy models, synthetic activations.

The experiments of `mechinterp.experiments` put these together; each function here answers one question about arrays.
"""
