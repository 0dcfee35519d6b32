#!/usr/bin/env bash
# configs/cifar10_tiny.py as it ships: 20 epochs, probes and report; two and a half hours on two CPU
# cores. Running it again continues it.
set -euo pipefail
python -m hjepa_jax.main --config=configs/cifar10_tiny.py
