"""Checkpoints: what is read is what was written, or it is refused by name."""

import json
import pathlib
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hjepa_jax import checkpoint, metrics, run, train
from hjepa_jax.array_table import describe_arrays, differences
from hjepa_jax.errors import InputError
from hjepa_jax.old_biases import with_old_biases
from hjepa_jax.train_state import TrainState


def make_state(step: int, *, width: int = 3) -> TrainState:
    """The arrays of a training state, without a model."""
    weights = jnp.arange(width * 4, dtype=jnp.float32).reshape(width, 4) + step
    return TrainState(
        step=jnp.int32(step),
        params={"context_encoder": {"kernel": weights}},
        target_params={"kernel": weights / 2},
        opt_state={"mu": weights.astype(jnp.bfloat16)},
        rng=jnp.array([1, step], jnp.uint32),
    )


def make_window():
    return metrics.empty_window(metrics.make_averages(["loss"]), batch_size=4, width=2)


@pytest.fixture
def workdir(tmp_path: pathlib.Path, tiny_config) -> pathlib.Path:
    """Checkpoints at steps 1 and 2."""
    checkpoints = checkpoint.Checkpoints(tmp_path, config=tiny_config, data="abc", owner=True)
    for step in (1, 2):
        checkpoints.save(make_state(step), make_window(), scores={})
        checkpoints.wait()
    checkpoints.close()
    return tmp_path


def restore(workdir, config, *, data="abc", width=3) -> TrainState:
    checkpoints = checkpoint.Checkpoints(workdir, config=config, data=data, owner=True)
    try:
        return checkpoints.restore(make_state(0, width=width), make_window())[0]
    finally:
        checkpoints.close()


def assert_same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_newest_checkpoint_comes_back_bit_for_bit(workdir, tiny_config):
    assert_same_tree(restore(workdir, tiny_config), make_state(2))


def test_a_table_tells_every_leaf_by_type_shape_and_bits():
    state = make_state(1)
    table = json.loads(json.dumps(describe_arrays(state)))
    assert differences(table, state) == []
    assert table[".params['context_encoder']['kernel']"][:2] == ["float32", [3, 4]]
    nudged = make_state(1)
    nudged.target_params["kernel"] = jnp.nextafter(nudged.target_params["kernel"], 9.0)
    assert describe_arrays(nudged)[".target_params['kernel']"] != table[".target_params['kernel']"]
    assert differences(table, nudged) == []


def test_a_checkpoint_of_another_model_is_refused_leaf_by_leaf(workdir, tiny_config):
    rule = r"does not fit this model: .*float32\[3, 4\] there, float32\[5, 4\] here"
    with pytest.raises(InputError, match=rule):
        restore(workdir, tiny_config, width=5)
    assert not (workdir / "damaged").exists()


def test_other_training_images_warn(workdir, tiny_config, capsys):
    restore(workdir, tiny_config)
    assert "warning" not in capsys.readouterr().err
    restore(workdir, tiny_config, data="xyz")
    assert "fingerprint abc -> xyz" in capsys.readouterr().err


def test_a_checkpoint_names_its_code_and_data(workdir, tiny_config):
    meta = json.loads((workdir / "checkpoints/2/meta/metadata").read_text())
    assert meta["format_version"] == 2
    assert meta["data"] == "abc"
    assert {"python", "jax", "flax", "orbax-checkpoint", "hjepa-jax"} <= set(meta["versions"])
    assert meta["config"]["train"]["batch_size"] == tiny_config.train.batch_size
    assert "commit" in meta


def rewrite_meta(workdir, step, **changes):
    path = workdir / f"checkpoints/{step}/meta/metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_checkpoint_of_a_newer_format_is_refused_and_stays(workdir, tiny_config):
    from hjepa_jax.array_table import json_checksum

    meta = json.loads((workdir / "checkpoints/2/meta/metadata").read_text())
    meta = {k: v for k, v in meta.items() if k != "checksum"} | {"format_version": 3}
    rewrite_meta(workdir, 2, format_version=3, checksum=json_checksum(meta))
    with pytest.raises(InputError, match="is in format 3; this version reads up to 2"):
        restore(workdir, tiny_config)
    assert (workdir / "checkpoints/2").is_dir()


def test_the_previous_format_is_read(tiny_config, tmp_path):
    """Format 1 had no table, and a window without the count of non-finite steps."""
    train.train_and_evaluate(tiny_config, tmp_path)
    built = run.build_run(tiny_config, run.open_config_source(tiny_config))
    state, _ = checkpoint.Checkpoints(tmp_path, config=tiny_config).restore(*built.create())
    shutil.rmtree(tmp_path / "checkpoints/6/window")
    path = tmp_path / "checkpoints/6/meta/metadata"
    meta = json.loads(path.read_text())
    old = {k: meta[k] for k in ("config", "versions", "scores")} | {"format_version": 1}
    path.write_text(json.dumps(old))
    again, window = checkpoint.Checkpoints(tmp_path, config=tiny_config).restore(*built.create())
    assert_same_tree(state, again)
    assert int(window.nonfinite.count) == 0


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(workdir, tiny_config, capsys):
    rewrite_meta(workdir, 2, data="abd")
    assert_same_tree(restore(workdir, tiny_config), make_state(1))
    assert "checkpoint 2 is damaged: the checksum of meta differs" in capsys.readouterr().err
    assert (workdir / "damaged/2").is_dir()
    assert not (workdir / "checkpoints/2").exists()


def test_readers_leave_a_damaged_checkpoint_where_it_is(workdir, tiny_config):
    rewrite_meta(workdir, 2, data="abd")
    checkpoints = checkpoint.Checkpoints(workdir, config=tiny_config)
    with pytest.raises(InputError, match=r"--step=2: is damaged .*the others are \[1\]"):
        checkpoints.restore_state(make_state(0))
    assert int(checkpoints.restore_state(make_state(0), 1).step) == 1
    checkpoints.close()


def test_complaints_of_others_go_where_they_went_before(workdir, tiny_config, monkeypatch):
    """TensorStore's, of damage that a reader knows of already, go nowhere while it is open."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    before = sys.unraisablehook
    rewrite_meta(workdir, 2, data="abd")
    checkpoints = checkpoint.Checkpoints(workdir, config=tiny_config, owner=True)
    checkpoints.restore(make_state(0), make_window())
    for text in ("Event loop is closed", "else"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
    checkpoints.close()
    assert [str(unraisable.exc_value) for unraisable in told] == ["else"]
    assert sys.unraisablehook is before


@pytest.mark.parametrize("which", ["last", "best"])
def test_readers_make_nothing_where_there_is_no_checkpoint(tiny_config, tmp_path, which):
    checkpoints = checkpoint.Checkpoints(tmp_path, config=tiny_config)
    with pytest.raises(InputError, match=r"needs a checkpoint|holds no checkpoint"):
        checkpoints.restore_state(make_state(0), checkpoints.find_step(which))
    checkpoints.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"format_version": "2"}', "{", ""])
def test_meta_that_is_none_is_damage(workdir, tiny_config, content):
    (workdir / "checkpoints/2/meta/metadata").write_text(content)
    assert_same_tree(restore(workdir, tiny_config), make_state(1))


def test_nothing_left_to_read_is_one_error(workdir, tiny_config):
    for step in (1, 2):
        rewrite_meta(workdir, step, data="abd")
    with pytest.raises(InputError, match="holds no checkpoint that can be read"):
        restore(workdir, tiny_config)


def save(workdir, config, scores: dict[int, float | None]) -> list[int]:
    """Saves a checkpoint for each step, in a process of its own as it were; the steps then kept."""
    checkpoints = checkpoint.Checkpoints(workdir, config=config, owner=True)
    for step, score in scores.items():
        scored = {} if score is None else {checkpoint.BEST_METRIC: score}
        checkpoints.save(make_state(step), make_window(), scores=scored)
    checkpoints.close()
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())


def best_step(workdir, config) -> int | None:
    checkpoints = checkpoint.Checkpoints(workdir, config=config)
    try:
        return checkpoints.find_step("best")
    finally:
        checkpoints.close()


def test_the_best_checkpoint_outlives_every_resume(tiny_config, tmp_path):
    tiny_config.train.keep_checkpoints = 1
    assert save(tmp_path, tiny_config, {1: 0.5, 2: 0.9, 3: 0.6, 4: None}) == [2, 4]
    assert save(tmp_path, tiny_config, {5: None, 6: 0.7}) == [2, 6]
    assert best_step(tmp_path, tiny_config) == 2
    assert save(tmp_path, tiny_config, {7: 0.9, 8: 0.1}) == [7, 8]  # of equals the newest
    assert best_step(tmp_path, tiny_config) == 7


def test_a_score_that_cannot_be_read_is_none(tiny_config, tmp_path):
    tiny_config.train.keep_checkpoints = 4
    save(tmp_path, tiny_config, {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6})
    rewrite_meta(tmp_path, 1, data="abd")
    (tmp_path / "checkpoints/2/meta/metadata").unlink()
    assert best_step(tmp_path, tiny_config) == 3
    tiny_config.train.keep_checkpoints = 1
    assert save(tmp_path, tiny_config, {5: 0.1}) == [3, 5]


def with_projection(state: TrainState) -> TrainState:
    """The state of a run whose views agree, with an optimizer that leaves kernels to another."""
    sizes = {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}
    projection = {"out": sizes}
    for i in range(2):
        projection |= {f"hidden_{i}": {"kernel": sizes["kernel"] + i}}
        projection |= {f"norm_{i}": {"scale": jnp.ones(5), "bias": jnp.full(5, 0.5 + i)}}
    left = jax.tree.map(lambda x: optax.MaskedNode() if x.ndim > 1 else x, projection)
    params = {**state.params, "projection": projection}
    return state.replace(params=params, opt_state={"mu": {"projection": left}})


def test_a_checkpoint_with_the_biases_of_old_projections_goes_on_without_them(
    tmp_path, tiny_config
):
    """Those of up to commit b92d0cf: the biases were taken away again by the norm behind them."""
    state = with_projection(make_state(1))
    old = with_old_biases(state)
    assert old.params["projection"]["hidden_1"]["bias"].tolist() == [1.5] * 5
    assert set(old.opt_state["mu"]["projection"]["hidden_1"]) == {"kernel", "bias"}
    for step, saved in ((1, old), (2, state)):
        options = {"config": tiny_config, "data": "abc", "owner": True}
        checkpoints = checkpoint.Checkpoints(tmp_path / str(step), **options)
        try:
            checkpoints.save(saved, make_window(), scores={})
            checkpoints.wait()
            assert_same_tree(checkpoints.restore(state, make_window())[0], state)
        finally:
            checkpoints.close()
