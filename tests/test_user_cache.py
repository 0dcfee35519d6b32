"""The cache that runs share: a cached result always equals a new one."""

import os

import jax
import numpy as np
import pytest

from hjepa_jax.data.tfds_info import files_of
from hjepa_jax.runtime import provenance, user_cache


@pytest.fixture
def calls(tmp_path):
    """Returns `get(key)` and a list of the keys whose arrays were created."""
    made = []

    def get(key, **options):
        def create():
            made.append(key)
            return {"x": np.arange(1000), "y": np.full(3, len(made))}

        return user_cache.kept_arrays(key, create, folder=tmp_path, **options)

    return get, made


def test_arrays_are_made_once_per_key(calls, capsys):
    get, made = calls
    first, again, other = get("a"), get("a"), get("b")
    assert made == ["a", "b"]
    assert "the next run starts from there" in capsys.readouterr().err
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert other["y"][0] == 2


def test_arrays_are_made_again_if_their_origin_changes(calls, tmp_path):
    found = [calls[0]("cifar10", made_from=origin)["y"][0] for origin in "aabba"]
    assert found == [1, 1, 2, 2, 3]
    assert len(list(tmp_path.glob("data/*"))) == 1, "new arrays must replace the old file"


def test_a_changed_data_file_is_noticed_even_with_the_old_time(tmp_path):
    path = tmp_path / "set.tfrecord"
    path.write_bytes(b"1234")
    before, stat = files_of(tmp_path), path.stat()
    assert files_of(tmp_path) == before
    path.write_bytes(b"1235")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` and rsync do
    after = files_of(tmp_path)
    assert after[0][:3] == before[0][:3]
    assert after != before


def test_the_source_code_is_part_of_the_cache_key(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    digest = provenance.source_digest.__wrapped__
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.py").write_text("1")
    (tmp_path / "b.py").write_text("1")
    found = [(digest(), digest("data"))]
    for name, text in (("b.py", "2"), ("data/a.py", "2"), ("data/c.py", "")):
        (tmp_path / name).write_text(text)
        found.append((digest(), digest("data")))
    whole, data = zip(*found, strict=True)
    assert len(set(whole)) == 4
    assert [data[0] == other for other in data[1:]] == [True, False, False]
    (tmp_path / "notes.txt").write_text("no code")
    assert (digest(), digest("data")) == found[-1]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_cache_file_is_made_again(calls, tmp_path, damage):
    get, made = calls
    get("a")
    (path,) = tmp_path.glob("data/*.npz")
    data = bytearray(path.read_bytes())
    data[300] ^= 255
    path.write_bytes({"cut": data[:1000], "flip": data, "empty": b""}[damage])
    np.testing.assert_array_equal(get("a")["x"], np.arange(1000))
    assert made == ["a", "a"]
    get("a")
    assert made == ["a", "a"]


@pytest.mark.parametrize("reason", ["without write access", "above the limit"])
def test_arrays_that_cannot_be_kept_are_made_again(calls, tmp_path, monkeypatch, capsys, reason):
    get, made = calls
    if reason == "above the limit":
        monkeypatch.setattr(user_cache, "MAX_KEPT_BYTES", 100)
    else:
        (tmp_path / "data").write_text("in the way")
    get("a"), get("a")
    assert made == ["a", "a"]
    assert not capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path != tmp_path / "data"]


def test_the_users_compilation_cache_is_respected(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    assert before  # tests/conftest.py sets it
    user_cache.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == before
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        user_cache.keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir.startswith(str(user_cache.cache_folder()))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
