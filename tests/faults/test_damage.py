"""Damage to checkpoint files is detected or harmless. Wrong arrays are never restored."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from hjepa_jax.runs import checkpoint
from tests.test_checkpoint import make_state, make_window

pytestmark = [
    pytest.mark.slow,
    # After an error Orbax closes its event loops. TensorStore still reports to them, and its own
    # threads fail.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def empty(content: bytes) -> bytes:
    return b""


def flip_bits(content: bytes) -> bytes:
    flipped = bytearray(content)
    for place in np.random.default_rng(len(content)).integers(0, max(len(content), 1), 5):
        flipped[place] ^= 1 << int(place) % 8
    return bytes(flipped)


def restored_step(workdir: pathlib.Path, config) -> int:
    """Returns the restored step, after a check of all arrays."""
    checkpoints = checkpoint.Checkpoints(workdir, config=config, owner=True)
    try:
        state, _ = checkpoints.restore(make_state(0), make_window())
    finally:
        checkpoints.close()
    step = int(state.step)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step))
    return step


def test_damage_to_any_file_is_detected_or_harmless(tmp_path, tiny_config, capsys):
    original = tmp_path / "original"
    checkpoints = checkpoint.Checkpoints(original, config=tiny_config, owner=True)
    for step in (1, 2):
        checkpoints.save(make_state(step), make_window(), scores={"eval/knn_top1": step / 10})
        checkpoints.wait()
    checkpoints.close()
    files = [p for p in (original / "checkpoints/2").rglob("*") if p.is_file()]
    assert len(files) > 5
    outcomes = {}
    for number, file in enumerate(files):
        account = file.parent.name == "meta"
        shorter = (truncate, empty) if account else [(truncate, empty)[number % 2]]
        for damage in (*shorter, flip_bits, None):
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(original, copy)
            place = copy / file.relative_to(original)
            if damage is None:
                place.unlink()
            else:
                place.write_bytes(damage(file.read_bytes()))
            step = restored_step(copy, tiny_config)
            outcomes[file.relative_to(original), damage] = step
            assert (copy / "damaged/2").exists() == (step == 1)
    # Some files are second copies, so their damage is harmless. Damage to meta never is harmless.
    assert 1 in {step for (file, _), step in outcomes.items() if "/d/" in str(file)}
    account = pathlib.Path("checkpoints/2/meta/metadata")
    assert [step for (file, _), step in outcomes.items() if file == account] == [1] * 4
    print(
        f"{len(outcomes)} damages of {len(files)} files, {list(outcomes.values()).count(1)} found"
    )
