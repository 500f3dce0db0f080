"""Experiments: problems, models, training, comparisons, demo; the library imports none of it."""
