#!/usr/bin/env bash
# results.csv: scaling on this machine. collectives_*.json: what ViT-Small exchanges. plan.csv.
set -euo pipefail
export PYTHONPATH=.
folder=experiments/scaling
python $folder/scaling.py --rounds=2 --steps=12
for layout in "1 16" "8 16"; do
  read -r fsdp batch <<< "$layout"
  # Only the program's text is wanted: the compiler need not try hard.
  XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" \
    python $folder/worker.py --model=vit_small --devices=8 --fsdp="$fsdp" --batch_size="$batch" \
    --steps=0 | tail -n 1 > $folder/collectives_vit_small_fsdp"$fsdp".json
done
python $folder/plan.py
