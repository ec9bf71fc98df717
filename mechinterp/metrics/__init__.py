"""Numbers about explanations and models: statistics now; image quality, faithfulness and localisation build on them."""
