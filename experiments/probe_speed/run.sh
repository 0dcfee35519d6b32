#!/usr/bin/env bash
# One process per protocol, so that peak memory is that protocol's.
set -euo pipefail
for protocol in knn linear quality; do
  python experiments/probe_speed/run.py --protocol="$protocol"
done
