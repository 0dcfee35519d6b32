"""Paths that users write in flags and in config fields."""

import pytest

from hjepa_jax.config import base_config
from hjepa_jax.config.fields import get_field
from hjepa_jax.errors import InputError
from hjepa_jax.runs import run
from hjepa_jax.runtime.paths import PATH_FIELDS, expand_paths, expand_source, local_path
from hjepa_jax.training import train


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("field", PATH_FIELDS)
def test_home_is_expanded_in_every_path_field(field, home):
    config = base_config()
    config.update_from_flattened_dict({field: "~/a b"})
    found = expand_paths(config.lock())
    assert get_field(found, field) == f"{home}/a b"
    assert found.is_locked
    assert get_field(config, field) == "~/a b"  # the config of the caller does not change


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("folder:~/x", "folder:HOME/x"),
        ("npz:~/x.npz", "npz:HOME/x.npz"),
        ("folder:./~/x", "folder:./~/x"),
        ("tfds:~", "tfds:~"),
        ("shapes", "shapes"),
        ("folder:", "folder:"),
    ],
)
def test_home_is_expanded_in_sources_with_a_path(source, found, home):
    assert expand_source("data.source", source) == found.replace("HOME", str(home))


@pytest.mark.parametrize("field", ["data.source", "data.class_list", "train.init_from"])
@pytest.mark.parametrize("address", ["gs://b/x", "s3://b/x", "file:///x", "hdfs://x", "https://x"])
def test_an_address_is_refused_in_every_field(field, address):
    config = base_config()
    address = f"folder:{address}" if field == "data.source" else address
    config.update_from_flattened_dict({field: address})
    with pytest.raises(InputError, match=rf"^{field}='{address}': must be a path on this machine"):
        expand_paths(config)


def test_tfds_may_read_from_an_address():
    config = base_config()
    config.data.dir = "gs://tfds-data/datasets"
    assert expand_paths(config).data.dir == "gs://tfds-data/datasets"


def test_a_colon_does_not_make_an_address():
    assert str(local_path("--workdir", "runs/12:30")) == "runs/12:30"
    assert str(local_path("--workdir", "a:b")) == "a:b"


def test_a_run_finds_data_in_the_home_folder(tiny_config, home, shapes_npz):
    (home / "mine.npz").symlink_to(shapes_npz.removeprefix("npz:"))
    tiny_config.data.source = "npz:~/mine.npz"
    assert run.open_config_source(expand_paths(tiny_config)).info.num_train == 240
    tiny_config.data.source = "npz:gs://bucket/mine.npz"
    with pytest.raises(InputError, match="must be a path on this machine"):
        train.train_and_evaluate(tiny_config, home / "run")
    assert not (home / "run").exists()
