"""Data sources, on-device augmentation and the input pipeline."""
