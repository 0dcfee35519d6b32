#!/usr/bin/env bash
# Measures the quick suite test by test: bash experiments/suite/run.sh OUT.csv [test files]; without files, all of them.
set -euo pipefail
cd "$(dirname "$0")/../.."
out="$1"
shift
JAX_COMPILATION_CACHE_DIR="$(mktemp -d)" HJEPA_MEASURE="$out.tests" \
  .venv/bin/python -m pytest -n 0 -p experiments.suite.measure "$@"
.venv/bin/python -m experiments.suite.measure "$out.tests" > "$out"
