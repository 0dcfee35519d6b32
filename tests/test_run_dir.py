"""Which configs may resume a run, and which files a start writes to the work directory."""

import contextlib
import dataclasses
import errno
import json
import os
import re

import pytest

from hjepa_jax.config import base_config
from hjepa_jax.errors import InputError
from hjepa_jax.runs.lock import claimed, is_claimed, lock_owner, locked
from hjepa_jax.runs.record import RunRecord, read_record
from hjepa_jax.runs.same_run import Saved
from hjepa_jax.runs.workdir import (
    check_workdir,
    load_config,
    prepare_workdir,
    with_recorded_start,
    writing,
)
from hjepa_jax.runtime.files import fcntl

NUM_IMAGES = 2_560  # ten batches
RECORD = RunRecord(
    num_images=NUM_IMAGES,
    num_steps=200,
    steps_per_epoch=10,
    class_names=("cat", "dog"),
    data={"source": "tfds:cifar10", "fingerprint": "all-abc", "num_train": NUM_IMAGES},
    preprocessing={"image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3},
)


def with_changes(overrides):
    config = base_config()
    config.update_from_flattened_dict(overrides)
    return config


def start(config, workdir, saved=None, record=RECORD):
    """Checks and prepares the work directory, as training does before its first step."""
    check_workdir(config, workdir, saved=saved, data=record)
    prepare_workdir(config, workdir, record, saved=saved)


def workdir_of(tmp_path, overrides, num_updates):
    """Creates the work directory of a run after `num_updates` updates; returns its config."""
    config = with_changes(overrides)
    start(config, tmp_path)
    (tmp_path / "checkpoints" / str(num_updates)).mkdir(parents=True)
    return config


def saved_by(config, step=4, fingerprint="all-abc"):
    """Returns the facts that a checkpoint of a run with this config stores."""
    return Saved(step, json.loads(json.dumps(config.to_dict())), fingerprint)


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


CONSTANT, LONGER = {"optim.decay_epochs": 0.0}, {"train.num_epochs": 40.0}
FASTER, COOLED = (
    {"optim.learning_rate": 2e-3},
    {"optim.decay_epochs": 5.0, "train.num_epochs": 10.0},
)
LINEAR = CONSTANT | {"optim.ema_momentum": (0.99, 1.0, "linear")}
ONLINE = {"model.target": "online", "loss.regularizer": "sigreg", "loss.regularized": "both"}


@pytest.mark.parametrize(
    ("config", "num_updates", "change", "words"),
    [
        # The first case is late in the cosine schedule; the second is at its start.
        ({}, 100, LONGER, "made update 100 at learning_rate 0.000541"),
        ({}, 12, LONGER, "made update 12 at learning_rate 0.00099972"),
        ({}, 10, LONGER, ""),
        ({}, 9, FASTER, "made update 9 at learning_rate 0.0009, not 0.0018"),
        ({}, 0, FASTER, ""),
        ({}, 50, {"train.num_steps": 200}, ""),  # the same length as 20 epochs
        ({}, 50, {"train.num_steps": 49}, "made 50 updates where this one would end after 49"),
        (CONSTANT, 50, COOLED | {"optim.final_learning_rate": 1e-5}, ""),
        (CONSTANT, 51, COOLED, "made update 51 at learning_rate 0.001, not 0.000999"),
        (LINEAR, 1, LONGER, "made update 1 at ema_momentum 0.99005, not 0.990025"),
        (LINEAR | ONLINE, 50, LONGER, ""),  # this run has no EMA
        (CONSTANT | {"optim.final_weight_decay": 0.1}, 50, {"train.num_epochs": 10.0},
         "made update 50 at weight_decay 0.0573"),
        (CONSTANT, 5, {"train.batch_size": 128}, "(train.batch_size 256 -> 128);"),
    ],
)  # fmt: skip
def test_a_config_must_not_change_past_updates(tmp_path, config, num_updates, change, words):
    config = workdir_of(tmp_path, config, num_updates)
    saved = (tmp_path / "config.json").read_bytes()
    config.update_from_flattened_dict(change)
    if words:
        with pytest.raises(InputError, match=re.escape(words)):
            start(config, tmp_path)
        assert (tmp_path / "config.json").read_bytes() == saved
    else:
        start(config, tmp_path)
        assert load_config(tmp_path).to_dict() == config.to_dict()


def test_a_resumed_config_is_saved_and_its_changes_are_printed(tmp_path, capsys):
    config = workdir_of(tmp_path, {"optim.decay_epochs": 0.0}, 50)
    assert capsys.readouterr().out == ""
    config.train.num_epochs, config.log.every_steps = 30.0, 7
    config.train.on_collapse, config.platform = "stop", "cpu"
    start(config, tmp_path)
    assert capsys.readouterr().out == "goes on with train.num_epochs 20.0 -> 30.0\n"
    assert load_config(tmp_path).to_dict() == config.to_dict()
    config.log.every_steps = 9
    start(config, tmp_path)
    assert load_config(tmp_path).log.every_steps == 9
    saved = (tmp_path / "config.json").stat().st_mtime_ns
    start(config, tmp_path)
    assert (tmp_path / "config.json").stat().st_mtime_ns == saved


# Kinds of damage to config.json: (function from the old text to the new one, message).
# None as the new text removes the file.
CASES = {
    "missing": (lambda text: None, "config.json is missing"),
    "empty": (lambda text: "", "no config of this version"),
    "damaged": (lambda text: '{"seed": ', "no config of this version"),
    "another": (lambda text: text.replace("smooth_l1", "mse"), "of another config (loss.kind)"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_checkpoint_decides_which_config_may_resume(tmp_path, capsys, case):
    config, path = with_changes({}), tmp_path / "config.json"
    start(config, tmp_path)
    harm, said = CASES[case]
    text = harm(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    before = contents(tmp_path)
    for wrong, fields in (
        ({"loss.kind": "mse"}, "loss.kind 'smooth_l1' -> 'mse'"),
        ({"mask.num_blocks": 3}, "mask.num_blocks 4 -> 3"),
        ({"optim.b2": 0.9}, "optim.b2 0.95 -> 0.9"),
        ({"seed": 1}, "seed 0 -> 1"),
    ):
        with pytest.raises(InputError, match=re.escape(f"of another config ({fields})")):
            check_workdir(with_changes(wrong), tmp_path, saved=saved_by(config), data=RECORD)
    assert contents(tmp_path) == before
    capsys.readouterr()
    start(config, tmp_path, saved_by(config))
    assert said in capsys.readouterr().out
    assert load_config(tmp_path).to_dict() == config.to_dict()


def test_a_rate_edited_in_config_json_does_not_change_the_past(tmp_path):
    faster = workdir_of(tmp_path, FASTER, 4)
    with pytest.raises(InputError, match=r"made update 4 at learning_rate 0.0004, not 0.0008"):
        start(faster, tmp_path, saved_by(with_changes({})))


def test_a_checkpoint_of_an_unknown_version_is_refused_in_one_line(tmp_path):
    saved = dataclasses.replace(saved_by(with_changes({})), config={"tower": 3})
    with pytest.raises(InputError, match="of step 4 is none of this version: unknown tower"):
        check_workdir(with_changes({}), tmp_path, saved=saved, data=RECORD)


@pytest.mark.parametrize("left", ["metrics.jsonl", "probe.json", "checkpoints"])
def test_results_of_an_unknown_run_are_not_added_to(tmp_path, left):
    row = {"protocol": "knn", "encoder": "target", "step": 1, "pool": "mean", "level": 0, "dim": 8,
           "data": "x", "top1": 0.5, "chosen": {"val_top1": 0.5}}  # fmt: skip
    text = {"metrics.jsonl": '{"step": 1}\n', "probe.json": json.dumps({"results": [row]})}
    if left in text:
        (tmp_path / left).write_text(text[left])
    else:
        (tmp_path / left / "7").mkdir(parents=True)
    with pytest.raises(InputError, match=f"holds {left} of a run, but neither"):
        check_workdir(with_changes({}), tmp_path)


def test_other_files_do_not_make_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.jsonl").touch()
    start(with_changes({}), tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("folder:d/x", "folder:d/x/", True), ("folder:d/x", "folder:/data/x", True),
        ("folder:~/x", "folder:/home/me/x", True), ("npz:a.npz", "npz:../b/a.npz", True),
        ("tfds:cifar10", "tfds:cifar10:3.0.2", True), ("tfds:cifar10", "tfds:cifar100", False),
        ("folder:d/x", "npz:d/x", False), ("folder:d/x", "shapes", False),
    ],
)  # fmt: skip
def test_moved_data_is_accepted_if_its_fingerprint_is_the_same(tmp_path, capsys, old, new, same):
    saved = saved_by(workdir_of(tmp_path, {"data.source": old}, 4))
    config = with_changes({"data.source": new})
    other_images = dataclasses.replace(RECORD, data={**RECORD.data, "fingerprint": "all-xyz"})
    unknown = r"not known to be the same \(fingerprint all-abc -> all-xyz\)"
    for known in (None, saved):
        if not same:
            with pytest.raises(InputError, match=r"another config .data.source"):
                check_workdir(config, tmp_path, saved=known)
            continue
        check_workdir(config, tmp_path, saved=known)  # the images are not known yet
        with pytest.raises(InputError, match=unknown):
            check_workdir(config, tmp_path, saved=known, data=other_images)
        check_workdir(config, tmp_path, saved=known, data=RECORD)
    if same:
        start(config, tmp_path, saved)
        assert f"goes on with data.source '{old}' -> '{new}'" in capsys.readouterr().out


def test_a_moved_class_list_is_accepted_with_the_same_images(tmp_path):
    streamed = {"data.streaming": "always", "data.class_list": "a.txt"}
    start(with_changes(streamed), tmp_path)
    config = with_changes({**streamed, "data.class_list": "lists/a.txt"})
    check_workdir(config, tmp_path, data=RECORD)
    with pytest.raises(InputError, match=r"data.class_list 'a.txt' -> None"):
        check_workdir(with_changes({"data.streaming": "always"}), tmp_path, data=RECORD)


@pytest.mark.parametrize("num_images", [NUM_IMAGES - 1, NUM_IMAGES + 256])
def test_a_run_does_not_resume_with_another_number_of_images(tmp_path, num_images):
    config = workdir_of(tmp_path, {}, 4)
    data = dataclasses.replace(RECORD, num_images=num_images)
    rule = f"was trained on 2560 images, and data.source has {num_images} now"
    for saved in (None, saved_by(config)):
        with pytest.raises(InputError, match=rule):
            check_workdir(config, tmp_path, saved=saved, data=data)
    # run.json describes other images than the checkpoint: the number of its images is unknown.
    saved = saved_by(config, fingerprint="all-old")
    with pytest.raises(InputError, match=r"other images \(fingerprint all-old.* -> all-abc"):
        check_workdir(config, tmp_path, saved=saved, data=data)
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match=r"other images .*no usable run.json"):
        check_workdir(config, tmp_path, saved=saved, data=data)
    images = "all-0123456789abcdef"
    touched = saved_by(config, fingerprint=f"{images}-1")  # only the file times differ
    now = dataclasses.replace(RECORD, data={**RECORD.data, "fingerprint": f"{images}-2"})
    check_workdir(config, tmp_path, saved=touched, data=now)
    os.rmdir(tmp_path / "checkpoints" / "4")  # nothing was trained yet
    check_workdir(config, tmp_path, data=data)


@pytest.mark.parametrize("fingerprint", ["all-old", "0123456789abcdef"])
def test_a_run_on_an_older_drawing_of_shapes_is_refused(tmp_path, fingerprint):
    old = dataclasses.replace(RECORD, data={**RECORD.data, "fingerprint": fingerprint})
    config = with_changes({"data.source": "shapes"})
    start(config, tmp_path, record=old)
    check_workdir(config, tmp_path, data=RECORD)  # nothing was trained yet
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    for saved in (None, saved_by(config, fingerprint=fingerprint)):
        check_workdir(config, tmp_path, saved=saved, data=old)
        with pytest.raises(InputError, match=r"the set was redrawn since; choose") as refused:
            check_workdir(config, tmp_path, saved=saved, data=RECORD)
        assert "\n" not in str(refused.value)


def test_a_run_that_cannot_become_longer_gives_advice(tmp_path):
    config = workdir_of(tmp_path, {}, 200)
    config.update_from_flattened_dict(LONGER)
    rule = r"choose another --workdir, with --config.train.init_from=\S+ to begin .*decay_epochs=0"
    with pytest.raises(InputError, match=rule):
        check_workdir(config, tmp_path, data=RECORD)


def test_init_from_may_be_omitted_or_spelt_differently_on_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir, config = tmp_path / "run", with_changes({"train.init_from": "runs/a"})
    start(config, workdir)
    for saved in (None, saved_by(config)):
        again = with_recorded_start(with_changes({}), workdir, saved)
        assert again.train.init_from == "runs/a"
        check_workdir(again, workdir, saved=saved, data=RECORD)
        for same in (str(tmp_path / "runs/a"), "./runs/a/"):
            other = with_changes({"train.init_from": same})
            assert with_recorded_start(other, workdir, saved).train.init_from == same
            check_workdir(other, workdir, saved=saved, data=RECORD)
        other = with_changes({"train.init_from": "runs/b"})
        with pytest.raises(InputError, match=r"train.init_from 'runs/a' -> 'runs/b'"):
            check_workdir(other, workdir, saved=saved, data=RECORD)
    plain = tmp_path / "plain"
    start(with_changes({}), plain)
    with pytest.raises(InputError, match=r"train.init_from None -> 'runs/a'"):
        check_workdir(config, plain, data=RECORD)


def test_a_run_from_before_a_field_was_added_goes_on_as_it_began(tmp_path):
    config = with_changes({})
    start(config, tmp_path)
    path = tmp_path / "config.json"
    old = json.loads(path.read_text())
    del old["data"]["stored_area"]
    path.write_text(json.dumps(old))
    of_old = dataclasses.replace(saved_by(config), config=old)
    for saved in (None, of_old):
        again = with_recorded_start(config, tmp_path, saved)
        assert again.data.stored_area == 1.0
        check_workdir(again, tmp_path, saved=saved, data=RECORD)
    larger = with_recorded_start(with_changes({"data.stored_area": 2.0}), tmp_path, of_old)
    with pytest.raises(InputError, match=r"data.stored_area 1.0 -> 2.0"):
        check_workdir(larger, tmp_path, saved=of_old, data=RECORD)
    same = with_recorded_start(config, tmp_path, saved_by(config))
    assert same.data.stored_area == 4.0
    with pytest.raises(InputError, match=r"data.stored_area 4.0 -> 2.0"):
        check_workdir(with_changes({"data.stored_area": 2.0}), tmp_path, saved=saved_by(config))


def test_a_failed_start_removes_all_that_it_made(tmp_path):
    workdir = tmp_path / "runs" / "a"

    def fail(error):
        with claimed(workdir):
            start(with_changes({}), workdir)
            (workdir / "checkpoints").mkdir()
            (workdir / "metrics.jsonl").touch()
            assert is_claimed(workdir)
            raise error

    for error in (InputError("a", 1, "b"), KeyboardInterrupt(), ZeroDivisionError()):
        with pytest.raises(type(error)):
            fail(error)
        assert list(tmp_path.iterdir()) == []


def test_a_failed_start_keeps_existing_files(tmp_path):
    start(with_changes({}), tmp_path)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "probe.json").write_text("{}")
    before = contents(tmp_path)
    with contextlib.suppress(ZeroDivisionError), claimed(tmp_path):
        (tmp_path / "metrics.jsonl").touch()
        raise ZeroDivisionError
    assert contents(tmp_path) == before


def test_a_run_that_fails_after_its_start_is_kept(tmp_path):
    with contextlib.suppress(ZeroDivisionError), claimed(tmp_path / "run") as begin:
        start(with_changes({}), tmp_path / "run")
        begin()
        raise ZeroDivisionError
    assert load_config(tmp_path / "run")
    assert not lock_owner(tmp_path / "run")


def test_a_lock_file_removed_by_another_start_is_made_again(tmp_path, monkeypatch):
    flock = fcntl.flock

    def remove_and_lock(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / "lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with locked(tmp_path):
        assert "process" in (tmp_path / "lock").read_text()
        with pytest.raises(InputError, match="in use"), locked(tmp_path):
            pass


def test_the_lock_holds_on_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    in_use = pytest.raises(InputError, match="in use by another process")
    with locked(tmp_path), in_use, locked(tmp_path):
        pass


def test_run_json_round_trips_and_an_invalid_one_is_ignored(tmp_path):
    start(with_changes({}), tmp_path)
    assert read_record(tmp_path) == RECORD
    text = (tmp_path / "run.json").read_text()
    for harmed in ("", "[]", "{}", "3", text.replace('"format_version": 1', '"format_version": 9'),
                   text.replace("2560", '"many"'), text[:-20], "[" * 99_999):  # fmt: skip
        (tmp_path / "run.json").write_text(harmed)
        assert read_record(tmp_path) is None


@pytest.fixture
def no_room():
    """Lets this process create files but not write to them, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "use",
    [
        lambda workdir: check_workdir(base_config(), workdir),
        lambda workdir: prepare_workdir(base_config(), workdir, RECORD),
        lambda workdir: check_workdir(base_config(), workdir / "new"),
    ],
    ids=["check", "prepare", "check of a new one"],
)
def test_a_full_disk_gives_one_line(tmp_path, no_room, use):
    with pytest.raises(InputError, match=r"^--workdir=.*can be written \(File too large\)"):
        use(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["lock"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EROFS])
def test_messages_of_system_errors_are_kept(tmp_path, number):
    refused = pytest.raises(InputError, match=rf"^--workdir=.*\({os.strerror(number)}\)")
    with refused, writing(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_lock_file_in_another_encoding_is_read(tmp_path):
    (tmp_path / "lock").write_bytes(b"process 1 on caf\xe9")
    other = (tmp_path / "lock").open()
    fcntl.flock(other, fcntl.LOCK_EX)
    in_use = pytest.raises(InputError, match="is in use by process 1 on caf\ufffd")
    with in_use, locked(tmp_path):
        pass
    assert lock_owner(tmp_path) == "process 1 on caf\ufffd"
    other.close()
