"""What is kept between runs: never anything else than what would be made anew."""

import jax
import numpy as np
import pytest

from hjepa_jax import user_cache


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
