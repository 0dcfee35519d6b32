#!/usr/bin/env bash
# configs/cifar10_tiny.py as it ships: 20 epochs, probes and report; 2.7 hours on two CPU cores
# (AMD EPYC, float32). Running it again continues it.
set -euo pipefail
python -m hjepa_jax.main --config=configs/cifar10_tiny.py
