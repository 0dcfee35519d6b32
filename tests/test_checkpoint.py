"""Checkpoints: what is read is what was written, or it is refused by name."""

import json
import pathlib
import shutil
import sys
import types
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hjepa_jax.errors import InputError
from hjepa_jax.method.train_state import MomentState, TrainState
from hjepa_jax.method.window import empty_window, make_averages
from hjepa_jax.runs import array_table, checkpoint, run
from hjepa_jax.runs.array_table import crc_checksums, describe_arrays, differences, json_checksum
from hjepa_jax.runs.old_biases import with_old_biases


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
    return empty_window(make_averages(["loss"]), batch_size=4, width=2)


@pytest.fixture
def workdir(tmp_path: pathlib.Path, tiny_config) -> pathlib.Path:
    """Checkpoints at steps 1 and 2."""
    checkpoints = checkpoint.Checkpoints(tmp_path, config=tiny_config, data="all-abc", owner=True)
    for step in (1, 2):
        checkpoints.save(make_state(step), make_window(), scores={})
        checkpoints.wait()
    checkpoints.close()
    return tmp_path


def restore(workdir, config, *, data="all-abc", width=3) -> TrainState:
    checkpoints = checkpoint.Checkpoints(workdir, config=config, data=data, owner=True)
    try:
        return checkpoints.restore(make_state(0, width=width), make_window())[0]
    finally:
        checkpoints.close()


def assert_same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_running_moment_is_saved_and_restored(tmp_path, tiny_config):
    moment = jnp.arange(9.0).reshape(3, 3)
    state = MomentState(**vars(make_state(2)), spread_moment=moment)
    checkpoints = checkpoint.Checkpoints(tmp_path, config=tiny_config, owner=True)
    checkpoints.save(state, make_window(), scores={})
    checkpoints.wait()
    asked = MomentState(**vars(make_state(0)), spread_moment=0 * moment)
    assert_same_tree(checkpoints.restore(asked, make_window())[0], state)
    checkpoints.close()


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


def checksum_by_hand(x: np.ndarray) -> int:
    raw, size, total = x.tobytes(), min(x.dtype.itemsize, 4), 0
    for i in range(len(raw) // size):
        word = int.from_bytes(raw[i * size : (i + 1) * size], "little") + i * 0x9E3779B9
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            word = (word ^ ((word % 2**32) >> shift)) * factor % 2**32
        total += word
    return total % 2**32


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "x",
    [
        RNG.normal(size=(3, 5, 7)).astype(np.float32),
        RNG.normal(size=(2, 5)).astype(jnp.bfloat16),
        RNG.normal(size=(4, 3)),
        RNG.integers(-128, 128, (3, 3), np.int8),
        RNG.integers(0, 2, 9).astype(bool),
        np.int32([7])[0],
        np.zeros((0, 3), np.float32),
        RNG.normal(size=(6, 4)).astype(np.float32).T,
    ],
    ids=lambda x: f"{x.dtype}{list(x.shape)}",
)
def test_checksums_are_those_by_hand_on_host_and_device(x, monkeypatch):
    expected = checksum_by_hand(x)
    assert array_table.word_checksums([x]) == [expected]
    if x.size and x.dtype != np.float64:
        monkeypatch.setattr(array_table, "MIN_ON_DEVICE", 1)
        assert array_table.word_checksums([jnp.asarray(x)]) == [expected]


def test_every_flipped_bit_and_every_exchange_changes_the_checksum():
    x = RNG.integers(0, 2**32, 40, np.uint32)
    (before,) = array_table.word_checksums([x])
    flipped = [x ^ (np.arange(40) == i).astype("u4") * (1 << np.uint32(b))
               for i in range(40) for b in range(32)]  # fmt: skip
    exchanged = [x[np.r_[i, 1:i, 0, i + 1 : 40]] for i in range(1, 40)]
    assert before not in array_table.word_checksums(flipped + exchanged)
    zeros = np.zeros(40, np.uint32)
    assert array_table.word_checksums([zeros]) != array_table.word_checksums([zeros[:39]])


def test_large_arrays_stay_on_the_device(monkeypatch):
    """Only sums come to the host: 4 bytes of an array in one piece."""
    x, fetched, copy = jnp.ones((256, 257)), [], np.asarray
    monkeypatch.setattr(
        np, "asarray", lambda a, *b, **k: fetched.append(np.size(a)) or copy(a, *b, **k)
    )
    small = x[0]
    fetched.clear()
    describe_arrays({"x": x, "small": small})
    assert max(fetched) == 257


def test_a_checkpoint_of_another_model_is_refused_leaf_by_leaf(workdir, tiny_config):
    rule = r"does not fit this model: .*float32\[3, 4\] there, float32\[5, 4\] here"
    with pytest.raises(InputError, match=rule):
        restore(workdir, tiny_config, width=5)
    assert not (workdir / "damaged").exists()


def test_other_training_images_warn(workdir, tiny_config, capsys):
    restore(workdir, tiny_config)
    assert "warning" not in capsys.readouterr().err
    restore(workdir, tiny_config, data="all-xyz")
    assert "fingerprint all-abc -> all-xyz" in capsys.readouterr().err


def test_a_fingerprint_of_a_sample_of_the_images_is_compared_with_nothing(
    tiny_config, tmp_path, capsys
):
    """Older versions looked at every (n // 256)-th image: a difference there means nothing."""
    checkpoints = checkpoint.Checkpoints(
        tmp_path, config=tiny_config, data="0123456789abcdef", owner=True
    )
    checkpoints.save(make_state(1), make_window(), scores={})
    checkpoints.close()
    assert_same_tree(restore(tmp_path, tiny_config, data="all-xyz"), make_state(1))
    assert "warning" not in capsys.readouterr().err


FIELDS = ("step", "params", "target_params", "opt_state", "rng")


@pytest.mark.parametrize("wanted", [("target_params",), ("step", "params", "target_params")])
def test_only_the_fields_asked_for_are_read(workdir, tiny_config, wanted, monkeypatch):
    looked_at = []
    real = checkpoint.describe_arrays
    monkeypatch.setattr(
        checkpoint, "describe_arrays", lambda tree, how: looked_at.append(tree) or real(tree, how)
    )
    whole = make_state(2)
    asked = TrainState(
        **{name: getattr(whole, name) if name in wanted else None for name in FIELDS}
    )
    with checkpoint.Checkpoints(workdir, config=tiny_config) as checkpoints:
        found = checkpoints.restore_state(asked)
    assert_same_tree(found, asked)
    assert len(looked_at) == 1, "what was read is checked"
    assert [name for name in FIELDS if getattr(looked_at[0], name) is not None] == [
        name for name in FIELDS if name in wanted
    ], "nothing else was brought into memory"


def change_checksum(workdir, path):
    """Writes another checksum for an array of checkpoint 2, as if one of its bits had flipped."""
    from hjepa_jax.runs.array_table import json_checksum

    meta = json.loads((workdir / "checkpoints/2/meta/metadata").read_text())
    meta["arrays"]["state"][path][2] ^= 1
    meta.pop("checksum")
    rewrite_meta(workdir, 2, **meta, checksum=json_checksum(meta))


def test_a_damaged_array_is_refused_if_it_is_asked_for(workdir, tiny_config):
    asked = TrainState(None, None, make_state(0).target_params, None, None)
    change_checksum(workdir, ".opt_state['mu']")
    with checkpoint.Checkpoints(workdir, config=tiny_config) as checkpoints:
        assert_same_tree(
            checkpoints.restore_state(asked).target_params, make_state(2).target_params
        )
    with (
        checkpoint.Checkpoints(workdir, config=tiny_config) as checkpoints,
        pytest.raises(InputError, match=r"checksum of state \.opt_state"),
    ):
        checkpoints.restore_state(make_state(0))
    change_checksum(workdir, ".target_params['kernel']")
    with (
        checkpoint.Checkpoints(workdir, config=tiny_config) as checkpoints,
        pytest.raises(InputError, match=r"checksum of state \.target_params"),
    ):
        checkpoints.restore_state(asked)


def test_fields_of_another_model_are_refused_leaf_by_leaf(workdir, tiny_config):
    asked = TrainState(None, None, make_state(0, width=5).target_params, None, None)
    rule = r"does not fit this model: .target_params.* is float32\[3, 4\] there, float32\[5, 4\]"
    with (
        checkpoint.Checkpoints(workdir, config=tiny_config) as checkpoints,
        pytest.raises(InputError, match=rule),
    ):
        checkpoints.restore_state(asked)


def test_a_checkpoint_names_its_code_and_data(workdir, tiny_config):
    meta = json.loads((workdir / "checkpoints/2/meta/metadata").read_text())
    assert meta["format_version"] == 3
    assert meta["data"] == "all-abc"
    assert {"python", "jax", "flax", "orbax-checkpoint", "hjepa-jax"} <= set(meta["versions"])
    assert meta["config"]["train"]["batch_size"] == tiny_config.train.batch_size
    assert "commit" in meta


def rewrite_meta(workdir, step, **changes):
    path = workdir / f"checkpoints/{step}/meta/metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_checkpoint_of_a_newer_format_is_refused_and_stays(workdir, tiny_config):
    meta = json.loads((workdir / "checkpoints/2/meta/metadata").read_text())
    meta = {k: v for k, v in meta.items() if k != "checksum"} | {"format_version": 4}
    rewrite_meta(workdir, 2, format_version=4, checksum=json_checksum(meta))
    with pytest.raises(InputError, match="is in format 4; this version reads up to 3"):
        restore(workdir, tiny_config)
    assert (workdir / "checkpoints/2").is_dir()


def as_format_2(workdir, step, **changes):
    """Makes of a checkpoint of `make_state` one of format 2, whose table has CRC-32 checksums."""
    trees = {"state": make_state(step), "window": make_window()}
    tables = {name: describe_arrays(tree, crc_checksums) for name, tree in trees.items()}
    assert tables["state"][".rng"][2] == zlib.crc32(np.array([1, step], "<u4").tobytes())
    tables["state"][".rng"][2] ^= changes.pop("flip", 0)
    meta = json.loads((workdir / f"checkpoints/{step}/meta/metadata").read_text())
    meta |= {"format_version": 2, "arrays": tables}
    del meta["checksum"]
    rewrite_meta(workdir, step, **meta, checksum=json_checksum(meta))


def test_format_2_is_read_and_its_checksums_hold(workdir, tiny_config, capsys):
    as_format_2(workdir, 1)
    as_format_2(workdir, 2, flip=1)
    assert_same_tree(restore(workdir, tiny_config), make_state(1))
    assert "checkpoint 2 is damaged: the checksum of state .rng differs" in capsys.readouterr().err


def test_format_1_is_read(tiny_config, tiny_run, tmp_path):
    """Format 1 had no table, and a window without the count of non-finite steps."""
    shutil.copytree(tiny_run, tmp_path, dirs_exist_ok=True)
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
    rewrite_meta(workdir, 2, data="all-abd")
    assert_same_tree(restore(workdir, tiny_config), make_state(1))
    assert "checkpoint 2 is damaged: the checksum of meta differs" in capsys.readouterr().err
    assert (workdir / "damaged/2").is_dir()
    assert not (workdir / "checkpoints/2").exists()


def test_readers_leave_a_damaged_checkpoint_where_it_is(workdir, tiny_config):
    rewrite_meta(workdir, 2, data="all-abd")
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
    rewrite_meta(workdir, 2, data="all-abd")
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
        rewrite_meta(workdir, step, data="all-abd")
    for _ in range(2):  # the second time, too: nothing is moved away
        with pytest.raises(InputError, match="holds no checkpoint that can be read"):
            restore(workdir, tiny_config)
    assert not (workdir / "damaged").exists()


def test_another_config_reads_no_checkpoint_although_its_arrays_fit(workdir, tiny_config):
    """As after an edit of config.json: features would be made in another way, without a word."""
    for field, value in {"data.mean": (0.5, 0.5, 0.5), "mask.num_blocks": 3, "seed": 1}.items():
        other = tiny_config.copy_and_resolve_references()
        other.update_from_flattened_dict({field: value})
        with pytest.raises(InputError, match=rf"checkpoint at step 2 \({field} "):
            restore(workdir, other)
    assert not (workdir / "damaged").exists()
    tiny_config.optim.learning_rate, tiny_config.data.source = 0.5, "npz:moved.npz"
    tiny_config.eval.num_val = 7
    assert_same_tree(restore(workdir, tiny_config), make_state(2))


def test_the_newest_meta_that_can_be_read_says_whose_run_it_is(workdir, tiny_config):
    saved = checkpoint.read_saved(workdir, tiny_config)
    assert saved is not None
    assert (saved.step, saved.fingerprint) == (2, "all-abc")
    assert saved.config["train"]["batch_size"] == tiny_config.train.batch_size
    rewrite_meta(workdir, 2, data="all-abd")
    saved = checkpoint.read_saved(workdir, tiny_config)
    assert saved is not None
    assert saved.step == 1
    shutil.rmtree(workdir / "checkpoints/1/meta")
    assert checkpoint.read_saved(workdir, tiny_config) is None
    assert checkpoint.read_saved(workdir / "nowhere", tiny_config) is None
    assert not (workdir / "nowhere").exists()


def save(workdir, config, scores: dict[int, Any]) -> list[int]:
    """Saves a checkpoint for each step, in a process of its own as it were; the steps then kept.

    A score is that of level 0, a pair also has that of the summary tokens.
    """
    checkpoints = checkpoint.Checkpoints(workdir, config=config, owner=True)
    names = (checkpoint.BEST_METRIC, f"{checkpoint.BEST_METRIC}_summary")
    for step, score in scores.items():
        values = score if isinstance(score, tuple) else (score,)
        scored = {} if score is None else dict(zip(names, values, strict=False))
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


def test_the_best_checkpoint_is_that_of_the_better_features(tiny_config, tmp_path, capsys):
    """Level 0 falls while the summary tokens stand, as in experiments/cifar10_tiny_20."""
    tiny_config.train.keep_checkpoints = 1
    falling = {1: (0.48, 0.40), 2: (0.47, 0.53), 3: (0.46, 0.52), 4: None}
    assert save(tmp_path, tiny_config, falling) == [2, 4]
    assert best_step(tmp_path, tiny_config) == 2
    assert capsys.readouterr().out == "step 2 is the best: eval/knn_top1_summary 53.00 %\n"
    assert save(tmp_path, tiny_config, {5: (0.54, 0.5), 6: 0.1}) == [5, 6]
    assert best_step(tmp_path, tiny_config) == 5
    assert capsys.readouterr().out == "step 5 is the best: eval/knn_top1 54.00 %\n"


@pytest.mark.parametrize("field", ["num_val", "knn_bank_size"])
def test_scores_of_another_protocol_are_not_compared(tiny_config, tmp_path, field):
    """The best of each is kept; "best" is that by the protocol of the newest score."""
    tiny_config.train.keep_checkpoints = 1
    assert save(tmp_path, tiny_config, {1: 0.9, 2: 0.8}) == [1, 2]
    tiny_config.eval[field] = 30
    assert save(tmp_path, tiny_config, {3: None}) == [1, 3]
    assert best_step(tmp_path, tiny_config) == 1
    assert save(tmp_path, tiny_config, {4: 0.5, 5: 0.6, 6: 0.55}) == [1, 5, 6]
    assert best_step(tmp_path, tiny_config) == 5


def test_a_score_that_cannot_be_read_is_none(tiny_config, tmp_path):
    tiny_config.train.keep_checkpoints = 4
    save(tmp_path, tiny_config, {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6})
    rewrite_meta(tmp_path, 1, data="all-abd")
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
