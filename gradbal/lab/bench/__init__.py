"""What rules and engines cost: the command ``gradbal bench``, and what all benchmarks share."""
