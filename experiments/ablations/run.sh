#!/usr/bin/env bash
# Every row of both sweeps with three seeds; those that the csv files have are left out.
set -euo pipefail
for sweep in shapes cifar10; do
  PYTHONPATH=. python experiments/sweep.py "experiments/ablations/$sweep.py" "$@"
done
PYTHONPATH=. python experiments/sweep_table.py experiments/ablations/*.csv
