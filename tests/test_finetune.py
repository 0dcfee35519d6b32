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

ENCODER = VisionTransformer(2, 2, 16, depth=2, num_heads=2, num_summary_tokens=1)
AUGMENT = Augment(4, (0.5,) * 3, (0.25,) * 3, horizontal_flip=0.5)
# Most tests fine-tune with these settings: the update is compiled once for all of them.
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


@pytest.fixture(scope="module")
def scores(params):
    return run(params)


def test_learns_the_labels(scores):
    assert scores["top1"] > 0.8
    assert scores["train_loss"] < 1.0 < np.log(4)


def test_learning_rates_shrink_by_one_factor_per_layer(params):
    model = Classifier(ENCODER, 4)
    tree = jax.eval_shape(model.init, jax.random.PRNGKey(0), jnp.zeros((1, 4, 4, 3)))["params"]
    scales = layer_scales(tree, depth=2, layer_decay=0.5)
    assert scales["head"]["kernel"] == scales["norm"]["scale"] == 1.0
    encoder = scales["encoder"]
    assert encoder["norm"]["scale"] == 0.5
    assert encoder["block_1"]["mlp_in"]["kernel"] == 0.5
    assert encoder["block_0"]["attention"]["qkv"]["kernel"] == 0.25
    assert encoder["patch_embedding"]["kernel"] == encoder["summary_tokens"] == 0.125


def test_a_tiny_layer_decay_freezes_the_encoder(params, tmp_path):
    class Keep:
        def restore(self, state):
            return state

        def save(self, step, state):
            self.state = state

    for settings, stays in (
        (dataclasses.replace(SETTINGS, layer_decay=1e-9), True),
        (SETTINGS, False),
    ):
        kept = Keep()
        run(params, settings, checkpoints=kept)
        moved = jax.tree.map(
            lambda a, b: float(jnp.max(jnp.abs(a - b))), kept.state.params["encoder"], params
        )
        assert (max(jax.tree.leaves(moved)) < 1e-6) == stays
        assert np.any(kept.state.params["head"]["kernel"])


def test_an_interrupted_fine_tuning_resumes(params, scores, tmp_path):
    class Spy(NewestCheckpoint):
        def __init__(self, *args):
            super().__init__(*args)
            self.saved = []

        def save(self, step, state):
            self.saved.append(step)
            super().save(step, state)

    class Cut(Spy):
        def save(self, step, state):
            super().save(step, state)
            if step == 16:
                raise KeyboardInterrupt

    cut = Cut(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(params, checkpoints=cut)
    cut.close()
    again = Spy(tmp_path)
    assert run(params, checkpoints=again) == scores
    assert again.saved == [24, 32, 40, 48]  # not 8 and 16: those epochs are not done again
    assert run(params, checkpoints=again) == scores
    assert again.saved == [24, 32, 40, 48]  # nothing was left to do
    again.close()


def test_a_damaged_checkpoint_is_named_and_replaced(params, scores, tmp_path, capsys):
    kept = NewestCheckpoint(tmp_path)
    run(params, checkpoints=kept)
    kept.close()
    (step,) = tmp_path.iterdir()
    for file in step.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    again = NewestCheckpoint(tmp_path)
    assert run(params, checkpoints=again) == scores
    again.close()
    assert f"{tmp_path}/{step.name} is damaged and deleted: " in capsys.readouterr().err


def test_a_non_finite_loss_is_refused(params):
    with pytest.raises(InputError, match=r"^--protocols=.finetune.: .*learning rate of 1e\+30"):
        run(params, dataclasses.replace(SETTINGS, num_epochs=1, learning_rate=1e30))


def test_test_labels_change_only_the_score(params, scores):
    noise = np.random.default_rng(5).permutation(TEST.labels)
    other = run(params, test=dataclasses.replace(TEST, labels=noise))
    assert other["train_loss"] == scores["train_loss"]
    assert other["top1"] != scores["top1"]


def test_drop_path_drops_branches_only_with_a_key(params):
    dropping = ENCODER.clone(drop_path=0.5)
    x = jax.random.normal(jax.random.PRNGKey(1), (64, 4, 4, 3))
    plain, _ = jax.jit(ENCODER.apply)({"params": params}, x)
    apply = jax.jit(dropping.apply)
    without_key, _ = apply({"params": params}, x)
    np.testing.assert_array_equal(plain, without_key)
    rngs = [{"drop_path": jax.random.PRNGKey(i)} for i in (2, 3)]
    a, b = (apply({"params": params}, x, rngs=r)[0] for r in rngs)
    assert np.any(a != b)
    # The first block drops nothing, the last each of its two branches with probability 1/2: of 64
    # images about a quarter are left as the first block made them.
    first, _ = jax.jit(ENCODER.clone(depth=1).apply)({"params": params}, x)
    untouched = np.isclose(a, first, atol=1e-5).all(axis=(1, 2)).mean()
    assert 0.08 < untouched < 0.45
