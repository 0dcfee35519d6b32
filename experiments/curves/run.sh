#!/usr/bin/env bash
# Six runs of 600 steps, the figures of docs/reading-the-curves.md, and results.csv.
set -euo pipefail
python experiments/curves/run.py
