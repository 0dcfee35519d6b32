#!/usr/bin/env bash
# The CIFAR-10 rows of results.csv, by today's script (the protocol's linear probe instead
# of ridge, scored on held-out training images instead of test images).
set -euo pipefail
short_run() {
  echo "$@"
  PYTHONPATH=. python experiments/recipes/short_run.py --config=configs/cifar10_patches.py \
    --num_fit=8000 --config.eval.num_val=4000 --config.model.width=128 --config.model.depth=4 \
    --config.model.num_heads=4 --config.model.predictor_width=64 \
    --config.model.predictor_num_heads=2 --config.optim.warmup_epochs=0.1 \
    --config.model.positions=sincos2d --config.optim.learning_rate=1e-3 "$@"
}
cells="--config.mask.align_level=1 --config.mask.scale=(0.15,0.25)"
blocks="--config.mask.align_level=0 --config.mask.scale=(0.1,0.15)"
strong="--config.loss.regularizer_weight=0.05 --config.train.batch_size=128 --config.optim.learning_rate=2e-3"
short_run $cells $strong --config.train.num_steps=300 --config.model.positions=learned
short_run $cells $strong --config.train.num_steps=300
short_run $cells $strong --config.train.num_steps=250 --config.loss.regularized=context
short_run $blocks $strong --config.train.num_steps=250
short_run $blocks --config.train.num_steps=500
short_run $blocks --config.train.num_steps=350 --config.optim.learning_rate=2e-3
short_run $blocks --config.train.num_steps=350 --config.loss.regularizer_weight=0.003
