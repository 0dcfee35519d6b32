#!/usr/bin/env bash
# Both measurements. The two versions of the step are taken from git: before and after d3564c9.
set -euo pipefail
before=$(mktemp -d)
after=$(mktemp -d)
git archive 0a85fdd | tar -x -C "$before"
git archive d3564c9 | tar -x -C "$after"
here=$PWD
export JAX_PLATFORMS=cpu
PYTHONPATH=$before python experiments/own_images/run.py programs
cd "$after"
PYTHONPATH=. python experiments/own_images/run.py programs
PYTHONPATH=. python experiments/own_images/run.py steps --before="$before"
cp experiments/own_images/results.csv "$here/experiments/own_images/"
cd "$here"
export PYTHONPATH=.
python experiments/own_images/run.py feed --batch_size=2 --num_turns=3
