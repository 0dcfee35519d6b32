#!/usr/bin/env bash
# Twenty epochs of cifar10_patches in batches of 256 at a rate that is kept, its probe table and its
# report. Running it again continues it.
set -euo pipefail
workdir=runs/cifar10_patches_20
python -m hjepa_jax.main --config=configs/cifar10_patches.py --workdir="$workdir" \
  --config.train.batch_size=256 --config.optim.learning_rate=1e-3 \
  --config.optim.final_learning_rate=1e-3 --config.model.dtype=bfloat16 \
  --config.parallel.cpu_devices=2 --config.log.every_steps=13 \
  --config.train.checkpoint_every_epochs=0.5
python -m hjepa_jax.probe --workdir="$workdir" --step=best --encoders=target --protocols=linear,knn
