"""What is kept between runs: never anything else than what would be made anew."""

import os

import jax
import numpy as np
import pytest

from hjepa_jax.data.tfds_info import files_of
from hjepa_jax.runtime import provenance, user_cache


@pytest.fixture
def calls(tmp_path):
    """`get(key)`, and the keys for which the arrays were made."""
    made = []

    def get(key):
        def create():
            made.append(key)
            return {"x": np.arange(1000), "y": np.full(3, len(made))}

        return user_cache.kept_arrays(key, create, folder=tmp_path)

    return get, made


def test_arrays_are_made_once_per_key(calls, capsys):
    get, made = calls
    first, again, other = get("a"), get("a"), get("b")
    assert made == ["a", "b"]
    assert "the next run starts from there" in capsys.readouterr().err
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert other["y"][0] == 2


def test_arrays_are_made_again_if_what_they_are_made_from_changes(tmp_path):
    made = []

    def get(made_from):
        def create():
            made.append(made_from)
            return {"x": np.full(3, len(made))}

        options = {"made_from": made_from, "folder": tmp_path}
        return user_cache.kept_arrays("cifar10", create, **options)["x"][0]

    assert [get("a"), get("a"), get("b"), get("b"), get("a")] == [1, 1, 2, 2, 3]
    assert len(list(tmp_path.glob("data/*"))) == 1, "new arrays replace the old"


def test_a_prepared_file_that_changes_is_noticed_whatever_its_time(tmp_path):
    path = tmp_path / "set.tfrecord"
    path.write_bytes(b"1234")
    before, stat = files_of(tmp_path), path.stat()
    assert files_of(tmp_path) == before
    path.write_bytes(b"1235")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` and rsync do
    after = files_of(tmp_path)
    assert after[0][:3] == before[0][:3]
    assert after != before


def test_code_that_decides_what_is_kept_is_part_of_its_key(tmp_path, monkeypatch):
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
def test_a_damaged_file_is_made_anew(calls, tmp_path, damage):
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


def test_where_nothing_can_be_written_nothing_is_kept(calls, tmp_path, capsys):
    get, made = calls
    (tmp_path / "data").write_text("in the way")
    get("a"), get("a")
    assert made == ["a", "a"]
    assert not capsys.readouterr().err


def test_more_than_the_limit_is_not_kept(calls, tmp_path, monkeypatch):
    get, made = calls
    monkeypatch.setattr(user_cache, "MAX_KEPT_BYTES", 100)
    get("a"), get("a")
    assert made == ["a", "a"]
    assert not list(tmp_path.rglob("*"))


def test_the_users_own_choice_of_a_compilation_cache_stands(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    assert before  # tests/conftest.py names one
    user_cache.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == before
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        user_cache.keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir.startswith(str(user_cache.cache_folder()))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
