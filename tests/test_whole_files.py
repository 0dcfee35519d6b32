import pytest

from hjepa_jax.runtime.files import replacing


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def write_a_part(path):
    with replacing(path) as file:
        file.write(b"ne")
        raise OSError("no room")


def test_an_error_keeps_the_old_file_and_removes_the_temporary_one(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OSError, match="no room"):
        write_a_part(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
