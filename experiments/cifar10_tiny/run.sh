#!/usr/bin/env bash
# Two epochs of cifar10_tiny, then its probe table. Running it again continues it.
set -euo pipefail
workdir=runs/cifar10_tiny_2epochs
python -m hjepa_jax.main --config=configs/cifar10_tiny.py --workdir="$workdir" \
  --config.train.num_epochs=2.0 --config.optim.warmup_epochs=0.1 --config.log.every_steps=20 \
  --config.train.checkpoint_every_epochs=0.25 --config.eval.every_epochs=0.25 \
  --config.eval.probe_at_end=False
python -m hjepa_jax.probe --workdir="$workdir"
