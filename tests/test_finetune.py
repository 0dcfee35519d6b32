import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax.data.augment import Augment
from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.finetune import Classifier, FinetuneSettings, finetune, layer_scales
from hjepa_jax.models.vit import VisionTransformer
from hjepa_jax.runs.newest_checkpoint import NewestCheckpoint
from tests.test_protocols import split

ENCODER = VisionTransformer(2, 2, 16, depth=1, num_heads=2, num_summary_tokens=1)
DEEP = ENCODER.clone(depth=2)
AUGMENT = Augment(4, (0.5,) * 3, (0.25,) * 3, horizontal_flip=0.5)
SETTINGS = FinetuneSettings(num_classes=4, num_epochs=6, batch_size=25, learning_rate=3e-3)
TRAIN, TEST = split(200, 0), split(80, 1)


def preprocess(images):
    return (jnp.asarray(images) / 255.0 - 0.5) / 0.25


@pytest.fixture(scope="module")
def params():
    return jax.jit(ENCODER.init)(jax.random.PRNGKey(0), jnp.zeros((1, 4, 4, 3)))["params"]


def run(params, settings=SETTINGS, test=TEST, **options):
    options = {"augment": AUGMENT, "preprocess": preprocess} | options
    return finetune(ENCODER, params, TRAIN, test, settings, **options)[0]


class Keep:
    """Keeps the newest state in memory."""

    def restore(self, state):
        return state

    def save(self, step, state):
        self.state = state


@pytest.fixture(scope="module")
def tuned(params):
    """Scores and final state of a complete fine-tuning."""
    kept = Keep()
    return run(params, checkpoints=kept), kept.state


def test_learns_the_labels(tuned):
    scores, _ = tuned
    assert scores["top1"] > 0.8
    assert scores["train_loss"] < 1.0 < np.log(4)


def test_learning_rates_shrink_by_one_factor_per_layer():
    tree = jax.eval_shape(Classifier(DEEP, 4).init, jax.random.PRNGKey(0), jnp.zeros((1, 4, 4, 3)))[
        "params"
    ]
    scales = layer_scales(tree, depth=2, layer_decay=0.5)
    assert scales["head"]["kernel"] == scales["norm"]["scale"] == 1.0
    encoder = scales["encoder"]
    assert encoder["norm"]["scale"] == 0.5
    assert encoder["block_1"]["mlp_in"]["kernel"] == 0.5
    assert encoder["block_0"]["attention"]["qkv"]["kernel"] == 0.25
    assert encoder["patch_embedding"]["kernel"] == encoder["summary_tokens"] == 0.125


def test_a_tiny_layer_decay_freezes_the_encoder(params, tuned):
    kept = Keep()
    run(params, dataclasses.replace(SETTINGS, layer_decay=1e-9, num_epochs=1), checkpoints=kept)
    for state, stays in ((kept.state, True), (tuned[1], False)):
        pairs = zip(*map(jax.tree.leaves, (state.params["encoder"], params)), strict=True)
        assert (max(np.abs(np.asarray(a) - b).max() for a, b in pairs) < 1e-6) == stays
        assert np.any(state.params["head"]["kernel"])


class Spy(NewestCheckpoint):
    """Records the saved steps; raises KeyboardInterrupt at step 16 if `cuts`."""

    def __init__(self, folder, *, cuts=False):
        super().__init__(folder)
        self.saved, self.cuts = [], cuts

    def save(self, step, state):
        self.saved.append(step)
        super().save(step, state)
        if self.cuts and step == 16:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_fine_tuning_resumes(params, tuned, tmp_path, capsys):
    """A finished run repeats only the test, so other test labels change only the test score."""
    scores, _ = tuned
    cut = Spy(tmp_path, cuts=True)
    with pytest.raises(KeyboardInterrupt):
        run(params, checkpoints=cut)
    cut.close()
    again = Spy(tmp_path)
    assert run(params, checkpoints=again) == scores
    assert again.saved == [24, 32, 40, 48]  # the epochs that end at 8 and 16 are not repeated
    noise = np.random.default_rng(5).permutation(TEST.labels)
    other = run(params, test=dataclasses.replace(TEST, labels=noise), checkpoints=again)
    assert again.saved == [24, 32, 40, 48]
    assert other["train_loss"] == scores["train_loss"]
    assert other["top1"] != scores["top1"]
    again.close()

    # A damaged checkpoint is reported and replaced.
    (step,) = tmp_path.iterdir()
    for file in step.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    anew = Spy(tmp_path)
    assert run(params, checkpoints=anew) == scores
    assert len(anew.saved) == 6
    anew.close()
    assert f"{tmp_path}/{step.name} is damaged and deleted: " in capsys.readouterr().err


def test_a_non_finite_loss_is_refused(params):
    broken = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), params)
    with pytest.raises(InputError, match=r"^--protocols=.finetune.: .*learning rate of 0.003"):
        run(broken)


def test_drop_path_drops_branches_only_with_a_key():
    x = jax.random.normal(jax.random.PRNGKey(1), (64, 4, 4, 3))
    params = jax.jit(DEEP.init)(jax.random.PRNGKey(0), x)
    plain, _ = jax.jit(DEEP.apply)(params, x)
    apply = jax.jit(DEEP.clone(drop_path=0.5).apply)
    np.testing.assert_array_equal(plain, apply(params, x)[0])
    a, b = (apply(params, x, rngs={"drop_path": jax.random.PRNGKey(i)})[0] for i in (2, 3))
    assert np.any(a != b)
    # The first block drops nothing. The last block drops each of its two branches with
    # probability 1/2, so about a quarter of the 64 images keep the output of the first block.
    first, _ = jax.jit(ENCODER.apply)(params, x)
    untouched = np.isclose(a, first, atol=1e-5).all(axis=(1, 2)).mean()
    assert 0.08 < untouched < 0.45
