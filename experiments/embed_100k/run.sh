#!/usr/bin/env bash
# A run of 100 steps, then 100,000 images through its encoder, with kills and without; DIR is where
# the run goes.
set -euo pipefail
DIR=${1:?folder for the run}
hjepa train shapes_tiny --workdir="$DIR" --config.train.num_steps=100
PYTHONPATH=. python experiments/embed_100k/run.py "$DIR" --num_images=100000
PYTHONPATH=. python experiments/embed_100k/run.py "$DIR" --num_drawn=1000 --kill_at --csv=whole.csv
