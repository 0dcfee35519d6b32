"""Converts encoders from and to the files of other projects, and writes tables of features."""
