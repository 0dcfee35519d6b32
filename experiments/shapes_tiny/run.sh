#!/usr/bin/env bash
set -euo pipefail
python -m hjepa_jax.main --config=configs/shapes_tiny.py --workdir=runs/shapes_tiny_first \
  --config.train.num_epochs=2.0 --config.optim.warmup_epochs=0.3 --config.train.batch_size=128
