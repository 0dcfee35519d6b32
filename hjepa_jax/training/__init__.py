"""Training: start, loop, alarms, warm start and final report."""
