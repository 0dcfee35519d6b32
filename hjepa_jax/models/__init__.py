"""Flax Linen modules: vision transformer, predictor, hierarchy, and their composition."""
