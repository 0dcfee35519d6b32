#!/usr/bin/env bash
# Needs 2 GB in the folder for temporary files.
set -euo pipefail
PYTHONPATH=. python experiments/long_log/run.py
