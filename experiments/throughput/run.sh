#!/usr/bin/env bash
# Half an hour on two cores that do nothing else; torch.compile takes a minute each time.
set -euo pipefail
python experiments/throughput/throughput.py --configs m1_max_quick_val cifar10_patches --rounds=2 --steps=10
PYTHONPATH=. python experiments/throughput/memory.py
