#!/usr/bin/env bash
# The AdamW recipe of cifar10_tiny_agreement, unchanged, on `shapes`; minutes on a GPU, hours on two CPU cores.
# Running it again continues it. Use commit dccc5b4: today's config is
# another (fewer blocks and views).
set -euo pipefail
python -m hjepa_jax.main --config=configs/cifar10_tiny.py --config.data.source=shapes \
  --workdir=runs/shapes_cifar10_recipe --config.model.dtype=bfloat16 \
  --config.train.steps_per_call=39 --config.log.every_steps=156 --config.eval.every_epochs=2.0 \
  --config.optim.kind=adamw --config.optim.learning_rate=7e-4
