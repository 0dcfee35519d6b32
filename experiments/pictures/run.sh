#!/usr/bin/env bash
# 60 steps of shapes_tiny with pictures after every sixth; two minutes on two cores.
set -euo pipefail
PYTHONPATH=. python experiments/pictures/run.py
