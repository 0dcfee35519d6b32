#!/usr/bin/env bash
# Both measurements, in the repository; DIR is where the stand-in for STL-10 is made (2 GB).
set -euo pipefail
DIR=${1:?folder for the data}
python experiments/streaming/run.py feed --set="$DIR"
python experiments/streaming/run.py memory --set="$DIR" --batch_size=8
