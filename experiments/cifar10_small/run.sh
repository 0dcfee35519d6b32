#!/usr/bin/env bash
# cifar10_small with three further views and VICReg at a kept rate, one and a half epochs, and its
# probes on held-out training images; some two hours on two CPU cores, an hour and a half with the
# jemalloc of experiments/throughput, by which most of it ran. Running it again continues it; a
# larger train.num_epochs makes it longer. Today's config is another: use commit b787efb.
set -euo pipefail
python -m hjepa_jax.main --config=configs/cifar10_small.py --workdir=runs/cifar10_small \
  --config.model.dtype=bfloat16 --config.data.local_views=3 \
  --config.loss.regularizer=vicreg --config.loss.regularizer_weight=0.01 \
  --config.optim.warmup_epochs=0.2 --config.optim.decay_epochs=0 --config.train.num_epochs=1.5 \
  --config.eval.every_epochs=0.25 --config.eval.probe_at_end=False \
  --config.train.checkpoint_every_epochs=0.25 --config.log.every_steps=13 --config.log.tensorboard=False
PYTHONPATH=. python experiments/held_out.py runs/cifar10_small
for field in eval/knn_top1 eval/knn_top1_summary; do
  PYTHONPATH=. python experiments/fitted_curve.py runs/cifar10_small 100 --field="$field"
done
