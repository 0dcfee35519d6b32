#!/usr/bin/env bash
# cifar10_tiny with Muon and three further views, four epochs, the last of a falling rate, with its
# probe table; two hours on two CPU cores. Running it again continues it. Today's config is another:
# use commit bac1bbf.
set -euo pipefail
python -m hjepa_jax.main --config=configs/cifar10_tiny.py --workdir=runs/cifar10_tiny_muon \
  --config.model.dtype=bfloat16 --config.data.local_views=3 \
  --config.loss.regularizer=vicreg --config.loss.regularizer_weight=0.01 \
  --config.optim.warmup_epochs=0.2 --config.optim.decay_epochs=1 --config.train.num_epochs=4 \
  --config.train.checkpoint_every_epochs=0.25 --config.log.every_steps=39
