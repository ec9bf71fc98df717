"""How fast the library is, against what its users would write otherwise: `python -m benchmarks [NAME ...]`."""
