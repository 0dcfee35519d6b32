#!/usr/bin/env bash
# Four runs of 160 steps, the figures of docs/reading-the-curves.md, and results.csv.
set -euo pipefail
python experiments/curves/run.py
