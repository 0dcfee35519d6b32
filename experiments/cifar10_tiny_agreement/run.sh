#!/usr/bin/env bash
# cifar10_tiny, twenty epochs, with its probe table; minutes on a GPU, hours on two CPU cores.
# Running it again continues it. Use commit dccc5b4: today's config is
# another (fewer blocks and views).
set -euo pipefail
python -m hjepa_jax.main --config=configs/cifar10_tiny.py --workdir=runs/cifar10_tiny_agreement \
  --config.model.dtype=bfloat16 --config.train.steps_per_call=39 --config.log.every_steps=390 \
  --config.train.checkpoint_every_epochs=5.0 --config.eval.every_epochs=2.0 \
  --config.optim.kind=adamw --config.optim.learning_rate=7e-4
