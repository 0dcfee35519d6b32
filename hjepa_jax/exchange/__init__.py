"""Encoders in the files of other projects: read into a work directory, written from one."""
