"""Judging a frozen encoder: features, probes and collapse diagnostics."""
