"""Training of a run, resuming from a file of finished runs, and summaries over seeds."""
