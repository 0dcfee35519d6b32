#!/usr/bin/env bash
# Six epochs of cifar10_tiny, its probe table and its report. Running it again continues it.
set -euo pipefail
workdir=runs/cifar10_tiny
python -m hjepa_jax.main --config=configs/cifar10_tiny.py --workdir="$workdir" \
  --config.train.num_epochs=6.0 --config.optim.warmup_epochs=0.2 --config.log.every_steps=20 \
  --config.train.checkpoint_every_epochs=0.25 --config.eval.every_epochs=1.0 \
  --config.parallel.cpu_devices=2 --config.model.dtype=bfloat16
