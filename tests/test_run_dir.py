"""Which configs may go on in the directory of a run."""

import errno
import os
import re

import pytest

from hjepa_jax import run_dir
from hjepa_jax.config import base_config
from hjepa_jax.errors import InputError
from hjepa_jax.whole_files import fcntl

NUM_IMAGES = 2_560  # ten batches


def workdir_of(tmp_path, overrides, num_updates):
    """A directory as a run leaves it that has made so many updates, and its config."""
    config = base_config()
    config.update_from_flattened_dict(overrides)
    run_dir.prepare_workdir(config, tmp_path, NUM_IMAGES)
    (tmp_path / "checkpoints" / str(num_updates)).mkdir(parents=True)
    return config


@pytest.mark.parametrize(
    ("config", "num_updates", "change", "words"),
    [
        # Far into a cosine, and right after it began.
        ({}, 100, {"train.num_epochs": 40.0}, "made update 100 at learning_rate 0.000541"),
        ({}, 12, {"train.num_epochs": 40.0}, "made update 12 at learning_rate 0.00099972"),
        ({}, 10, {"train.num_epochs": 40.0}, ""),
        ({}, 9, {"optim.learning_rate": 2e-3}, "made update 9 at learning_rate 0.0009, not 0.0018"),
        ({}, 0, {"optim.learning_rate": 2e-3}, ""),
        ({}, 50, {"train.num_steps": 200}, ""),  # as long as its 20 epochs
        ({}, 50, {"train.num_steps": 49}, "made 50 updates where this one would end after 49"),
        (
            {"optim.decay_epochs": 0.0}, 50,
            {
                "optim.decay_epochs": 5.0, "optim.final_learning_rate": 1e-5,
                "train.num_epochs": 10.0,
            },
            "",
        ),
        (
            {"optim.decay_epochs": 0.0}, 51,
            {"optim.decay_epochs": 5.0, "train.num_epochs": 10.0},
            "made update 51 at learning_rate 0.001, not 0.000999",
        ),
        (
            {"optim.decay_epochs": 0.0, "optim.ema_momentum": (0.99, 1.0, "linear")}, 1,
            {"train.num_epochs": 40.0},
            "made update 1 at ema_momentum 0.99005, not 0.990025",
        ),
        (
            {"optim.decay_epochs": 0.0, "optim.final_weight_decay": 0.1}, 50,
            {"train.num_epochs": 10.0}, "made update 50 at weight_decay 0.0573",
        ),
        (
            {"optim.decay_epochs": 0.0}, 5,
            {"train.batch_size": 128}, "(train.batch_size 256 -> 128);",
        ),
    ],
)  # fmt: skip
def test_what_was_done_must_stay_as_it_was(tmp_path, config, num_updates, change, words):
    config = workdir_of(tmp_path, config, num_updates)
    saved = (tmp_path / "config.json").read_bytes()
    config.update_from_flattened_dict(change)
    if words:
        with pytest.raises(InputError, match=re.escape(words)):
            run_dir.prepare_workdir(config, tmp_path, NUM_IMAGES)
        assert (tmp_path / "config.json").read_bytes() == saved
    else:
        run_dir.prepare_workdir(config, tmp_path, NUM_IMAGES)
        assert run_dir.load_config(tmp_path).to_dict() == config.to_dict()


def test_the_schedule_of_an_average_that_is_not_taken_may_change(tmp_path):
    config = workdir_of(
        tmp_path,
        {
            "model.target": "online", "loss.regularizer": "sigreg", "loss.regularized": "both",
            "optim.ema_momentum": (0.99, 1.0, "linear"), "optim.decay_epochs": 0.0,
        },
        50,
    )  # fmt: skip
    config.train.num_epochs = 40.0
    run_dir.prepare_workdir(config, tmp_path, NUM_IMAGES)


def test_a_run_goes_on_when_images_have_gone(tmp_path):
    config = workdir_of(tmp_path, {}, 200)
    run_dir.check_workdir(config, tmp_path, num_images=NUM_IMAGES - 256)


def test_how_a_run_goes_on_is_saved_and_other_schedules_are_said(tmp_path, capsys):
    config = workdir_of(tmp_path, {"optim.decay_epochs": 0.0}, 50)
    assert capsys.readouterr().out == ""
    config.train.num_epochs, config.log.every_steps = 30.0, 7
    config.train.on_collapse, config.platform = "stop", "cpu"
    run_dir.prepare_workdir(config, tmp_path, NUM_IMAGES)
    assert capsys.readouterr().out == "goes on with train.num_epochs 20.0 -> 30.0\n"
    assert run_dir.load_config(tmp_path).to_dict() == config.to_dict()
    config.log.every_steps = 9
    run_dir.prepare_workdir(config, tmp_path, NUM_IMAGES)
    assert run_dir.load_config(tmp_path).log.every_steps == 9
    saved = (tmp_path / "config.json").stat().st_mtime_ns
    run_dir.prepare_workdir(config, tmp_path, NUM_IMAGES)
    assert (tmp_path / "config.json").stat().st_mtime_ns == saved


@pytest.fixture
def no_room():
    """Until its end this process can make files, and write no byte into them, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def enter(workdir):
    with run_dir.locked(workdir):
        pass


@pytest.mark.parametrize(
    "use",
    [
        enter,
        lambda workdir: run_dir.check_workdir(base_config(), workdir),
        lambda workdir: run_dir.prepare_workdir(base_config(), workdir, NUM_IMAGES),
        lambda workdir: run_dir.check_workdir(base_config(), workdir / "new"),
    ],
    ids=["lock", "check", "prepare", "check of a new one"],
)
def test_a_disk_without_room_is_one_line(tmp_path, no_room, use):
    with pytest.raises(InputError, match=r"^--workdir=.*can be written \(File too large\)"):
        use(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["lock"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EROFS])
def test_whatever_the_system_refuses_is_told_in_its_words(tmp_path, number):
    with (
        pytest.raises(InputError, match=rf"^--workdir=.*\({os.strerror(number)}\)"),
        run_dir.writing(tmp_path),
    ):
        raise OSError(number, os.strerror(number))


def test_the_lock_file_of_another_character_set_is_read(tmp_path):
    (tmp_path / "lock").write_bytes(b"process 1 on caf\xe9")
    other = (tmp_path / "lock").open()
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="is in use by process 1 on caf\ufffd"):
        enter(tmp_path)
    assert run_dir.lock_owner(tmp_path) == "process 1 on caf\ufffd"
    other.close()
