#!/usr/bin/env bash
# Tries the faults that results.csv lacks, in commit b92d0cf and in this checkout: bash experiments/mutation/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
before="$(mktemp -d)"
trap 'rm -rf "$before"' EXIT
git archive b92d0cf | tar x -C "$before"
for suite in "before $before" "after ."; do
  read -r name folder <<< "$suite"
  .venv/bin/python experiments/mutation/mutants.py run "$folder" --suite="$name" --out=experiments/mutation/results.csv
done
