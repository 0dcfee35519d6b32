#!/usr/bin/env bash
# Both measurements; the older commit is taken from git.
set -euo pipefail
before=$(mktemp -d)
git archive 0a85fdd | tar -x -C "$before"
export JAX_PLATFORMS=cpu
PYTHONPATH=$before python experiments/own_images/run.py programs
export PYTHONPATH=.
python experiments/own_images/run.py programs
python experiments/own_images/run.py steps --before="$before"
python experiments/own_images/run.py feed --batch_size=2 --num_turns=3
