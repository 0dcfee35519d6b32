"""A run can start with the parameters of another run, even at another resolution."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hjepa_jax.errors import InputError
from hjepa_jax.models.positions import interpolate_positions
from hjepa_jax.runs import checkpoint, run
from hjepa_jax.runs.history import read_metrics
from hjepa_jax.runs.load import load_state
from hjepa_jax.runtime.placement import make_placement
from hjepa_jax.training import train, warm_start


@pytest.fixture
def trained(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "small")


def test_positions_are_interpolated_to_another_grid():
    table = jnp.asarray([[0.0], [1.0], [10.0], [11.0]])  # 2x2: columns differ by 1, rows by 10
    wider = np.asarray(interpolate_positions(table, 2, 4)).reshape(4, 4)
    np.testing.assert_allclose(wider[0], [0, 0.25, 0.75, 1], atol=1e-6)
    np.testing.assert_allclose(wider[:, 0], [0, 2.5, 7.5, 10], atol=1e-5)
    flat = interpolate_positions(table, 2, (2, 4)).reshape(2, 4)
    np.testing.assert_allclose(flat, [[0, 0.25, 0.75, 1], [10, 10.25, 10.75, 11]], atol=1e-5)
    np.testing.assert_allclose(interpolate_positions(table, 2, (2, 2)), table)


def paths_and_leaves(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["learned", "rope2d"])
def test_a_run_can_start_from_one_at_a_lower_resolution(
    tiny_config, tiny_run, tmp_path, monkeypatch, positions, capsys
):
    """The new run compiles only its own program."""
    tiny_config.model.positions, small = positions, tiny_run
    if positions != "learned":
        small = tmp_path / "small"
        train.train_and_evaluate(tiny_config, small)
    _, before, _ = load_state(small)
    tiny_config.data.image_size, tiny_config.mask.scale = 24, (0.1, 0.25)
    tiny_config.train.init_from = str(small)
    tiny_config.train.num_steps = tiny_config.train.checkpoint_every_steps = 1
    tiny_config.optim.learning_rate, tiny_config.optim.weight_decay = 0.0, 0.0
    tiny_config.optim.ema_momentum = (1.0, 1.0, "constant")
    compiled, make = [], run.make_run_steps
    monkeypatch.setattr(run, "make_run_steps", lambda step: compiled.append(step) or make(step))
    train.train_and_evaluate(tiny_config, tmp_path / "large")
    assert len(compiled) == 1
    assert f"train.init_from: starting from {small}, step 6" in capsys.readouterr().out
    _, after, initial = load_state(tmp_path / "large")
    assert int(after.step) == 1
    names, changed = ("params", "target_params"), []
    old, new, untrained = (
        paths_and_leaves({name: getattr(state, name) for name in names})
        for state in (before, after, initial)
    )
    assert old.keys() == new.keys()
    for path, leaf in old.items():
        if leaf.shape == new[path].shape:
            np.testing.assert_array_equal(leaf, new[path])
        else:
            changed.append(path)
    assert len(changed) == (3 if positions == "learned" else 0)
    assert all("embedding" in path for path in changed)
    kernel = "['params']['context_encoder']['patch_embedding']['kernel']"
    assert np.any(untrained[kernel] != new[kernel]), "the untrained baseline must stay random"


def test_the_other_run_is_needed_only_at_the_first_start(
    tiny_config, trained, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_config.train.init_from = "~/small"
    train.train_and_evaluate(tiny_config, tmp_path / "next")
    lines = read_metrics(tmp_path / "next" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines != read_metrics(trained / "metrics.jsonl")
    shutil.rmtree(trained)
    train.train_and_evaluate(tiny_config, tmp_path / "next")
    assert read_metrics(tmp_path / "next" / "metrics.jsonl") == lines


@pytest.mark.parametrize("damage", ["meta", "arrays"])
def test_a_damaged_source_is_refused_by_name(tiny_config, trained, tmp_path, damage):
    if damage == "meta":
        (trained / "checkpoints/6/meta/metadata").write_text("{}")
    else:
        shutil.rmtree(trained / "checkpoints/6/state")
    tiny_config.train.init_from = str(trained)
    rule = r"^train.init_from='.*small': its checkpoint 6 is damaged"
    with pytest.raises(InputError, match=rule):
        train.train_and_evaluate(tiny_config, tmp_path / "next")
    assert not (tmp_path / "next").exists()


# Fields that change the parameters or their meaning: value of this run, value of the other run.
NETWORKS = {
    "model.predictor_width": (12, 8), "model.num_heads": (4, 2), "model.num_levels": (1, 2),
    "model.positions": ("sincos2d", "'learned'"), "model.num_registers": (2, 0),
}  # fmt: skip
ONLY_ONE_MEANING = {"model.num_heads"}  # the parameters have the same shapes


@pytest.mark.parametrize("field", NETWORKS)
def test_other_networks_are_refused_by_field_or_by_path(tiny_config, tiny_run, monkeypatch, field):
    here, there = NETWORKS[field]
    tiny_config.update_from_flattened_dict({"train.init_from": str(tiny_run), field: here})
    with pytest.raises(InputError, match=rf"has other networks: {field} is {there} there and "):
        warm_start.check_source(tiny_config)
    if field in ONLY_ONE_MEANING:
        return
    monkeypatch.setattr(warm_start, "_networks", lambda config: {})
    with pytest.raises(InputError, match=r"has other networks: (context_encoder|predictor)/\S+ is"):
        warm_start.check_source(tiny_config)


def test_nothing_is_written_if_there_is_no_run_to_start_from(tiny_config, tmp_path):
    tiny_config.train.init_from = "/nowhere"
    with pytest.raises(InputError, match=r"train.init_from='/nowhere': holds no run"):
        train.train_and_evaluate(tiny_config, tmp_path / "next")
    assert not (tmp_path / "next").exists()


def with_head(config, sizes):
    config = config.copy_and_resolve_references()
    local = {"data.local_views": 1, "data.local_size": 8, "model.projection": sizes}
    config.update_from_flattened_dict({"loss.agreement_weight": 0.1, **local})
    return config


def begin(config, workdir):
    """Returns the first state of a run started from `workdir`, its fresh state and its window."""
    config.train.init_from = str(workdir)
    warm_start.check_source(config)
    built = train.build_run(config, run.open_config_source(config))
    state, window = built.create()
    return warm_start.start_from(str(workdir), built, state), state, window


@pytest.mark.slow
def test_a_projection_head_in_one_run_only_is_initialised_or_dropped(
    tiny_config, tiny_run, tmp_path, capsys
):
    _, theirs, _ = load_state(tiny_run)
    config = with_head(tiny_config, (8, 4))
    state, fresh, window = begin(config, tiny_run)
    assert "train.init_from: the projection head begins anew" in capsys.readouterr().out
    assert state.params.keys() == {"context_encoder", "predictor", "projection"}
    jax.tree.map(np.testing.assert_array_equal, state.params["projection"],
                 fresh.params["projection"])  # fmt: skip
    trained = {name: state.params[name] for name in ("context_encoder", "predictor")}
    jax.tree.map(np.testing.assert_array_equal, trained, theirs.params)

    workdir = tmp_path / "with_head"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    with checkpoint.Checkpoints(workdir, config=config, owner=True) as checkpoints:
        checkpoints.save(state, window, scores={})
    state, _, _ = begin(tiny_config, workdir)
    assert f"the projection head of {workdir} is left out" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, state.params, theirs.params)


def test_a_projection_head_of_another_size_is_initialised(capsys):
    there = {"encoder": {"a": np.zeros(3)}, "projection": {"b": np.zeros((2, 3))}}
    here = {"encoder": {"a": np.ones(3)}, "projection": {"b": np.ones((2, 4))}}
    place = make_placement(jax.devices(), fsdp=1)
    kept = warm_start._with_our_head("w", there, here, place)
    assert kept["encoder"] is there["encoder"]
    np.testing.assert_array_equal(kept["projection"]["b"], here["projection"]["b"])
    assert "begins anew: w has none of this size" in capsys.readouterr().out
    same = {"encoder": here["encoder"], "projection": {"b": np.ones((2, 3))}}
    assert warm_start._with_our_head("w", there, same, place) is there
    assert capsys.readouterr().out == ""


def test_an_unused_projection_head_may_differ(tiny_config, tiny_run):
    tiny_config.update_from_flattened_dict(
        {"train.init_from": str(tiny_run), "model.projection": (6, 2)}
    )
    warm_start.check_source(tiny_config)
