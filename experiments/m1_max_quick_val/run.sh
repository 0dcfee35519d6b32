#!/usr/bin/env bash
# The 5-epoch validation run; running it again continues it. Without an accelerator it takes hours.
set -euo pipefail
python -m hjepa_jax.main --config=configs/m1_max_quick_val.py --config.model.dtype=bfloat16 \
  --config.parallel.cpu_devices=2 --config.eval.every_epochs=0 --config.log.every_steps=10
