#!/usr/bin/env bash
# Six epochs of cifar10_patches with rotary positions and a lower rate, its probe table and its report.
# Running it again continues it.
set -euo pipefail
workdir=runs/cifar10_patches
python -m hjepa_jax.main --config=configs/cifar10_patches.py --workdir="$workdir" \
  --config.model.positions=rope2d --config.optim.learning_rate=3e-4 \
  --config.optim.warmup_epochs=0.2 --config.train.num_epochs=6.0 --config.model.dtype=bfloat16 \
  --config.parallel.cpu_devices=2 --config.log.every_steps=20 \
  --config.train.checkpoint_every_epochs=0.5
