"""The report of a run: facts, sections, figures, and pictures for TensorBoard."""
