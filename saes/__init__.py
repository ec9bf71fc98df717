"""Sparse autoencoders: training, evaluation, naming, gallery. The only package that imports sae_lens."""
