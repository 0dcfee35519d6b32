"""Masks of target blocks and context, sampled from explicit keys inside jit."""
