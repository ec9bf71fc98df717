"""The training step: encode, choose, decode, gradients and Adam, with sparse products written out."""
