"""Compare rules honestly: problems, their figures, and how these are summed up."""
