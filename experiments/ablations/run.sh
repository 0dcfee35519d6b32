#!/usr/bin/env bash
# Every row of run.py with three seeds; those that results.csv has are left out.
set -euo pipefail
PYTHONPATH=. python experiments/ablations/run.py "$@"
