#!/usr/bin/env bash
# Two epochs of cifar10_tiny. Running it again continues it.
set -euo pipefail
python -m hjepa_jax.main --config=configs/cifar10_tiny.py --workdir=runs/cifar10_tiny_2epochs \
  --config.train.num_epochs=2.0 --config.optim.warmup_epochs=0.25 --config.log.every_steps=10 \
  --config.train.checkpoint_every_epochs=0.25
