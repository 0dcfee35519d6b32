"""A run on disk: work directory, checkpoints, log, results."""
