#!/usr/bin/env bash
# Every fault of README.md, injected for real. Small disks need root on Linux; elsewhere those tests skip and say so.
set -euo pipefail
python -m pytest -m slow -s -rs tests/faults
