"""Checkpoints restore the saved arrays exactly, or are refused with an error that says why."""

import json
import pathlib
import shutil
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax.errors import InputError
from hjepa_jax.method.train_state import MomentState, TrainState
from hjepa_jax.method.window import empty_window, make_averages
from hjepa_jax.runs import array_table, checkpoint_meta
from hjepa_jax.runs.array_table import describe_arrays, differences, json_checksum
from hjepa_jax.runs.best import BEST_METRIC
from hjepa_jax.runs.checkpoint import Checkpoints
from hjepa_jax.runs.checkpoint_meta import read_saved
from tests.conftest import make_tiny_config


def make_state(step: int, *, width: int = 3) -> TrainState:
    """Returns a training state of small arrays, without a model."""
    weights = jnp.arange(width * 4, dtype=jnp.float32).reshape(width, 4) + step
    return TrainState(
        step=jnp.int32(step),
        params={"context_encoder": {"kernel": weights}},
        target_params={"kernel": weights / 2},
        opt_state={"mu": weights.astype(jnp.bfloat16)},
        rng=jnp.array([1, step], jnp.uint32),
    )


def make_window():
    return empty_window(make_averages(["loss"]), batch_size=4, width=2)


@pytest.fixture(scope="module")
def two_steps(shapes_npz, tmp_path_factory) -> pathlib.Path:
    """Checkpoints at steps 1 and 2."""
    folder, config = tmp_path_factory.mktemp("checkpoints"), make_tiny_config(shapes_npz)
    with Checkpoints(folder, config=config, data="all-abc", owner=True) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step), make_window(), scores={})
            checkpoints.wait()
    return folder


@pytest.fixture
def workdir(two_steps, tmp_path) -> pathlib.Path:
    """A copy of the checkpoints at steps 1 and 2."""
    return shutil.copytree(two_steps, tmp_path / "run")


def restore(workdir, config, *, data="all-abc", width=3) -> TrainState:
    with Checkpoints(workdir, config=config, data=data, owner=True) as checkpoints:
        return checkpoints.restore(make_state(0, width=width), make_window())[0]


def restore_part(workdir, config, state: TrainState) -> TrainState:
    with Checkpoints(workdir, config=config) as checkpoints:
        return checkpoints.restore_state(state)


def assert_same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def read_meta_file(workdir, step) -> dict[str, Any]:
    return json.loads((workdir / f"checkpoints/{step}/meta/metadata").read_text())


def rewrite_meta(workdir, step, *, checksum: bool = False, **changes) -> None:
    """Edits the metadata of a checkpoint. `checksum` makes its checksum match the edit."""
    meta = read_meta_file(workdir, step) | changes
    if checksum:
        del meta["checksum"]
        meta["checksum"] = json_checksum(meta)
    (workdir / f"checkpoints/{step}/meta/metadata").write_text(json.dumps(meta))


def test_a_running_moment_is_saved_and_restored(tmp_path, tiny_config):
    moment = jnp.arange(9.0).reshape(3, 3)
    state = MomentState(**vars(make_state(2)), spread_moment=moment)
    asked = MomentState(**vars(make_state(0)), spread_moment=0 * moment)
    with Checkpoints(tmp_path, config=tiny_config, owner=True) as checkpoints:
        checkpoints.save(state, make_window(), scores={})
        checkpoints.wait()
        assert_same_tree(checkpoints.restore(asked, make_window())[0], state)


# The table of arrays


def test_the_table_shows_every_leaf_with_type_shape_and_checksum():
    state = make_state(1)
    table = json.loads(json.dumps(describe_arrays(state)))
    assert differences(table, state) == []
    assert table[".params['context_encoder']['kernel']"][:2] == ["float32", [3, 4]]
    nudged = make_state(1)
    nudged.target_params["kernel"] = jnp.nextafter(nudged.target_params["kernel"], 9.0)
    assert describe_arrays(nudged)[".target_params['kernel']"] != table[".target_params['kernel']"]
    assert differences(table, nudged) == []


def checksum_by_hand(x: np.ndarray) -> int:
    raw, size, total = x.tobytes(), min(x.dtype.itemsize, 4), 0
    for i in range(len(raw) // size):
        word = int.from_bytes(raw[i * size : (i + 1) * size], "little") + i * 0x9E3779B9
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            word = (word ^ ((word % 2**32) >> shift)) * factor % 2**32
        total += word
    return total % 2**32


RNG = np.random.default_rng(0)
ARRAYS = [
    RNG.normal(size=(3, 5, 7)).astype(np.float32),
    RNG.normal(size=(2, 5)).astype(jnp.bfloat16),
    RNG.normal(size=(4, 3)),
    RNG.integers(-128, 128, (3, 3), np.int8),
    RNG.integers(0, 2, 9).astype(bool),
    np.int32([7])[0],
    np.zeros((0, 3), np.float32),
    RNG.normal(size=(6, 4)).astype(np.float32).T,
]


@pytest.mark.parametrize("x", ARRAYS, ids=lambda x: f"{x.dtype}{list(x.shape)}")
def test_checksums_equal_those_by_hand_on_host_and_device(x, monkeypatch):
    expected = checksum_by_hand(x)
    assert array_table.word_checksums([x]) == [expected]
    if x.size and x.dtype != np.float64:
        monkeypatch.setattr(array_table, "MIN_ON_DEVICE", 1)
        assert array_table.word_checksums([jnp.asarray(x)]) == [expected]


def test_every_flipped_bit_and_every_swap_changes_the_checksum():
    x = RNG.integers(0, 2**32, 40, np.uint32)
    (before,) = array_table.word_checksums([x])
    flipped = [x ^ (np.arange(40) == i).astype("u4") * (1 << np.uint32(b))
               for i in range(40) for b in range(32)]  # fmt: skip
    exchanged = [x[np.r_[i, 1:i, 0, i + 1 : 40]] for i in range(1, 40)]
    assert before not in array_table.word_checksums(flipped + exchanged)
    zeros = np.zeros(40, np.uint32)
    assert array_table.word_checksums([zeros]) != array_table.word_checksums([zeros[:39]])


def test_only_the_sums_of_large_arrays_come_to_the_host(monkeypatch):
    x, fetched, copy = jnp.ones((256, 257)), [], np.asarray
    spy = lambda a, *b, **k: fetched.append(np.size(a)) or copy(a, *b, **k)
    monkeypatch.setattr(np, "asarray", spy)
    small = x[0]
    fetched.clear()
    describe_arrays({"x": x, "small": small})
    assert max(fetched) == 257


# Restoring


def test_a_checkpoint_of_another_model_is_refused_leaf_by_leaf(workdir, tiny_config):
    rule = r"does not fit this model: .*float32\[3, 4\] there, float32\[5, 4\] here"
    with pytest.raises(InputError, match=rule):
        restore(workdir, tiny_config, width=5)
    assert not (workdir / "damaged").exists()
    target = TrainState(None, None, make_state(0, width=5).target_params, None, None)
    with pytest.raises(InputError, match=r"does not fit this model: .target_params"):
        restore_part(workdir, tiny_config, target)


def test_the_newest_checkpoint_restores_bit_for_bit(workdir, tiny_config, capsys):
    """If the training images have changed, a warning is printed."""
    assert_same_tree(restore(workdir, tiny_config), make_state(2))
    assert "warning" not in capsys.readouterr().err
    restore(workdir, tiny_config, data="all-xyz")
    assert "fingerprint all-abc -> all-xyz" in capsys.readouterr().err


FIELDS = ("step", "params", "target_params", "opt_state", "rng")


@pytest.mark.parametrize("wanted", [("target_params",), ("step", "params", "target_params")])
def test_only_the_requested_fields_are_read_and_checked(workdir, tiny_config, wanted, monkeypatch):
    checked = []
    spy = lambda tree: checked.append(tree) or describe_arrays(tree)
    monkeypatch.setattr(checkpoint_meta, "describe_arrays", spy)
    whole = make_state(2)
    part = {name: getattr(whole, name) if name in wanted else None for name in FIELDS}
    assert_same_tree(restore_part(workdir, tiny_config, TrainState(**part)), TrainState(**part))
    (tree,) = checked
    assert {name for name in FIELDS if getattr(tree, name) is not None} == {*wanted}


def change_checksum(workdir, path):
    """Changes the checksum of an array of checkpoint 2, as if a bit of the array had flipped."""
    arrays = read_meta_file(workdir, 2)["arrays"]
    arrays["state"][path][2] ^= 1
    rewrite_meta(workdir, 2, arrays=arrays, checksum=True)


def test_a_damaged_array_is_refused_if_it_is_requested(workdir, tiny_config):
    target = TrainState(None, None, make_state(0).target_params, None, None)
    change_checksum(workdir, ".opt_state['mu']")
    found = restore_part(workdir, tiny_config, target)
    assert_same_tree(found.target_params, make_state(2).target_params)
    with pytest.raises(InputError, match=r"checksum of state \.opt_state"):
        restore_part(workdir, tiny_config, make_state(0))
    change_checksum(workdir, ".target_params['kernel']")
    with pytest.raises(InputError, match=r"checksum of state \.target_params"):
        restore_part(workdir, tiny_config, target)


@pytest.mark.parametrize("version", [1, 2, 4])
def test_a_checkpoint_of_another_format_is_refused_and_stays(workdir, tiny_config, version):
    meta = read_meta_file(workdir, 2) | {"format_version": version}
    del meta["checksum"]
    checksum = {"checksum": json_checksum(meta)} if version > 1 else {}  # format 1 had no checksum
    (workdir / "checkpoints/2/meta/metadata").write_text(json.dumps({**meta, **checksum}))
    rule = f"--step=2: is in format {version}; this version reads format 3"
    with pytest.raises(InputError, match=rule):
        restore(workdir, tiny_config)
    with pytest.raises(InputError, match=rule):
        read_saved(workdir)
    assert (workdir / "checkpoints/2").is_dir()


def test_another_config_is_refused_although_the_arrays_fit(workdir, tiny_config):
    for field, value in {"data.mean": (0.5, 0.5, 0.5), "mask.num_blocks": 3, "seed": 1}.items():
        other = tiny_config.copy_and_resolve_references()
        other.update_from_flattened_dict({field: value})
        with pytest.raises(InputError, match=rf"checkpoint at step 2 \({field} "):
            restore(workdir, other)
    assert not (workdir / "damaged").exists()
    tiny_config.optim.learning_rate, tiny_config.data.source = 0.5, "npz:moved.npz"
    tiny_config.eval.num_val = 7
    assert_same_tree(restore(workdir, tiny_config), make_state(2))


# Damage


@pytest.mark.parametrize("content", [None, "{}", "[]", "3", '{"format_version": "2"}', "{", ""])
def test_a_damaged_meta_is_set_aside_and_the_step_before_restored(
    workdir, tiny_config, capsys, content
):
    if content is None:
        rewrite_meta(workdir, 2, data="all-abd")
    else:
        (workdir / "checkpoints/2/meta/metadata").write_text(content)
    assert_same_tree(restore(workdir, tiny_config), make_state(1))
    assert "checkpoint 2 is damaged: " in (told := capsys.readouterr().err)
    assert content is not None or "the checksum of meta differs" in told
    assert f"moved it to {workdir / 'damaged/2'}" in told
    assert (workdir / "damaged/2").is_dir()
    assert not (workdir / "checkpoints/2").exists()


def test_readers_do_not_move_a_damaged_checkpoint(workdir, tiny_config):
    rewrite_meta(workdir, 2, data="all-abd")
    with Checkpoints(workdir, config=tiny_config) as checkpoints:
        with pytest.raises(InputError, match=r"--step=2: is damaged .*the others are \[1\]"):
            checkpoints.restore_state(make_state(0))
        assert int(checkpoints.restore_state(make_state(0), 1).step) == 1


def test_if_all_checkpoints_are_damaged_none_is_moved(workdir, tiny_config):
    for step in (1, 2):
        rewrite_meta(workdir, step, data="all-abd")
    with pytest.raises(InputError, match="holds no checkpoint that can be read"):
        restore(workdir, tiny_config)
    assert not (workdir / "damaged").exists()


def test_only_late_errors_of_tensorstore_are_hidden(workdir, tiny_config, monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    before = sys.unraisablehook
    rewrite_meta(workdir, 2, data="all-abd")
    with Checkpoints(workdir, config=tiny_config, owner=True) as checkpoints:
        checkpoints.restore(make_state(0), make_window())
        for text in ("Event loop is closed", "else"):
            sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(unraisable.exc_value) for unraisable in reported] == ["else"]
    assert sys.unraisablehook is before


@pytest.mark.parametrize("which", ["last", "best"])
def test_readers_create_nothing_without_checkpoints(tiny_config, tmp_path, which):
    with (
        Checkpoints(tmp_path, config=tiny_config) as checkpoints,
        pytest.raises(InputError, match=r"needs a checkpoint|holds no checkpoint"),
    ):
        checkpoints.restore_state(make_state(0), checkpoints.find_step(which))
    assert not list(tmp_path.iterdir())


def test_the_newest_intact_meta_says_which_run_it_is(workdir, tiny_config):
    """The metadata also identifies the code and the data."""
    saved = read_saved(workdir)
    assert saved is not None
    assert (saved.step, saved.fingerprint) == (2, "all-abc")
    assert saved.config["train"]["batch_size"] == tiny_config.train.batch_size
    meta = read_meta_file(workdir, 2)
    assert meta["format_version"] == 3
    assert {"python", "jax", "flax", "orbax-checkpoint", "hjepa-jax"} <= set(meta["versions"])
    assert "commit" in meta
    rewrite_meta(workdir, 2, data="all-abd")
    saved = read_saved(workdir)
    assert saved is not None
    assert saved.step == 1
    shutil.rmtree(workdir / "checkpoints/1/meta")
    assert read_saved(workdir) is None
    assert read_saved(workdir / "nowhere") is None
    assert not (workdir / "nowhere").exists()


# The best checkpoint


def save(workdir, config, scores: dict[int, Any]) -> list[int]:
    """Saves a checkpoint for each step with new `Checkpoints`; returns the steps that are kept.

    A number is the score of level 0. A pair adds the score of the summary tokens.
    """
    with Checkpoints(workdir, config=config, owner=True) as checkpoints:
        for step, score in scores.items():
            values = score if isinstance(score, tuple) else (score,)
            names = (BEST_METRIC, f"{BEST_METRIC}_summary")
            scored = {} if score is None else dict(zip(names, values, strict=False))
            checkpoints.save(make_state(step), make_window(), scores=scored)
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())


def best_step(workdir, config) -> int | None:
    with Checkpoints(workdir, config=config) as checkpoints:
        return checkpoints.find_step("best")


def test_the_best_checkpoint_survives_every_resume(tiny_config, tmp_path):
    tiny_config.train.keep_checkpoints = 1
    assert save(tmp_path, tiny_config, {1: 0.5, 2: 0.9, 3: 0.6, 4: None}) == [2, 4]
    assert save(tmp_path, tiny_config, {5: None, 6: 0.7}) == [2, 6]
    assert best_step(tmp_path, tiny_config) == 2
    assert save(tmp_path, tiny_config, {7: 0.9, 8: 0.1}) == [7, 8]  # a tie: the newest is kept
    assert best_step(tmp_path, tiny_config) == 7


def test_the_best_checkpoint_is_the_best_of_all_features(tiny_config, tmp_path, capsys):
    tiny_config.train.keep_checkpoints = 1
    falling = {1: (0.48, 0.40), 2: (0.47, 0.53), 3: (0.46, 0.52), 4: None}
    assert save(tmp_path, tiny_config, falling) == [2, 4]
    assert best_step(tmp_path, tiny_config) == 2
    assert capsys.readouterr().out == "step 2 is the best: eval/knn_top1_summary 53.00 %\n"
    assert save(tmp_path, tiny_config, {5: (0.54, 0.5), 6: 0.1}) == [5, 6]
    assert best_step(tmp_path, tiny_config) == 5
    assert capsys.readouterr().out == "step 5 is the best: eval/knn_top1 54.00 %\n"


@pytest.mark.parametrize("field", ["num_val", "knn_bank_size"])
def test_the_best_of_each_protocol_is_kept_and_the_newest_protocol_counts(
    tiny_config, tmp_path, field
):
    tiny_config.train.keep_checkpoints = 1
    assert save(tmp_path, tiny_config, {1: 0.9, 2: 0.8}) == [1, 2]
    tiny_config.eval[field] = 30
    assert save(tmp_path, tiny_config, {3: None}) == [1, 3]
    assert best_step(tmp_path, tiny_config) == 1
    assert save(tmp_path, tiny_config, {4: 0.5, 5: 0.6, 6: 0.55}) == [1, 5, 6]
    assert best_step(tmp_path, tiny_config) == 5


def test_a_damaged_score_is_ignored(tiny_config, tmp_path):
    tiny_config.train.keep_checkpoints = 4
    save(tmp_path, tiny_config, {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6})
    rewrite_meta(tmp_path, 1, data="all-abd")
    (tmp_path / "checkpoints/2/meta/metadata").unlink()
    assert best_step(tmp_path, tiny_config) == 3
    tiny_config.train.keep_checkpoints = 1
    assert save(tmp_path, tiny_config, {5: 0.1}) == [3, 5]
