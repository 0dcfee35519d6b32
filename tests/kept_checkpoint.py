"""What a report must say of its run's newest checkpoint, computed again from the checkpoint.

Kept beside a report: python -m tests.kept_checkpoint runs/X > experiments/X/report/checkpoint.json
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

from hjepa_jax.config import build
from hjepa_jax.evaluation.knn import knn_predict
from hjepa_jax.evaluation.labelled import hold_out
from hjepa_jax.evaluation.quality import collapse_verdict
from hjepa_jax.runs import run
from hjepa_jax.runs.load import load_state
from hjepa_jax.runs.workdir import load_config
from tests.report_numbers import Checkpoint, percent


def read_checkpoint(workdir: pathlib.Path) -> Checkpoint:
    """The newest checkpoint of a run whose images are there."""
    folders = {int(path.name): path for path in (workdir / "checkpoints").iterdir()}
    sizes = {}
    for step, folder in sorted(folders.items()):
        num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        sizes[str(step)] = f"{num_bytes / 1e6:.1f} MB"
    newest = max(folders)
    meta = json.loads((folders[newest] / "meta/metadata").read_text())

    config = load_config(workdir)
    split, _ = run.open_config_source(config).load()
    model, state, _ = load_state(workdir)
    embed = jax.jit(build.build_embed_fn(config, model))
    bank, held_out = hold_out(len(split.images), num_val=config.eval.num_val)
    bank, held_out = bank[:: -(-len(bank) // 2000)], held_out[:: -(-len(held_out) // 500)]
    x, q = (
        np.asarray(embed(state.target_params, split.images[rows])["level_0"])
        for rows in (bank, held_out)
    )
    k, num_classes = min(20, len(bank)), int(split.labels.max()) + 1
    (found,) = knn_predict(x, split.labels[bank], q, ks=[k], num_classes=num_classes)
    v = collapse_verdict(q)
    return Checkpoint(
        versions={**meta["versions"], "commit": meta["commit"]},
        sizes=sizes,
        features=f"{len(q)} held-out training images beside {len(x)} others, target encoder at "
        f"step {newest}, level 0, mean over patches. k-NN with k = {k} gets "
        f"{percent(float((found == split.labels[held_out]).mean()))} % of them right.",
        verdict=f"Of the checkpoint at step {newest}, on {len(q)} held-out training images: "
        f"**{v.label}**, effective rank {v.effective_rank:.1f} of {v.max_rank}, relative std "
        f"{v.relative_std:.3f} (threshold {v.min_relative_std}).",
    )


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(read_checkpoint(pathlib.Path(sys.argv[1]))), indent=2))
