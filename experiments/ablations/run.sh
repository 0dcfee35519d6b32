#!/usr/bin/env bash
# Every row of both sweeps with three seeds; runs that are done are left out.
set -euo pipefail
for sweep in shapes cifar10; do
  hjepa sweep "experiments/ablations/$sweep.py" --num_fit=12000 "${@:---seeds=0,1,2}"
done
