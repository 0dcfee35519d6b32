#!/usr/bin/env bash
# Every row of shapes.py with three seeds; those that shapes.csv has are left out.
set -euo pipefail
PYTHONPATH=. python experiments/sweep.py experiments/ablations/shapes.py "$@"
