"""The training step: targets, losses, optimizer, EMA, and the metrics that it reports."""
