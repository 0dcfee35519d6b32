#!/usr/bin/env bash
# Memory and CPU seconds of a step of the configs for photos.
set -euo pipefail
PYTHONPATH=. python experiments/photos/run.py photos_96 --batch_size=8 > cpu.csv
mv cpu.csv experiments/photos/cpu.csv
