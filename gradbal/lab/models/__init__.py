"""Models of the experiments: encoders in stages, heads, and the architectures that share them."""
