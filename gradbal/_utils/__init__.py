"""Small tools that know nothing of tasks, rules or optimizers."""
