#!/usr/bin/env bash
# What `make demo` runs.
set -euo pipefail
python -m hjepa_jax.main --config=configs/shapes_tiny.py
