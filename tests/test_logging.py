import pytest

from hjepa_jax.logging import RunLogger, format_duration, read_metrics, summary_box


def test_values_of_one_step_share_a_line(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=False)
    logger.scalars(1, {"a": 1.0})
    logger.scalars(1, {"b": 2.0})
    logger.scalars(2, {"a": 3.0})
    logger.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a": 1.0, "b": 2.0},
        {"step": 2, "a": 3.0},
    ]


def test_a_resumed_log_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"ste')
    logger = RunLogger(tmp_path, tensorboard=False, resume_step=2)
    logger.scalars(3, {"a": 4})
    logger.close()
    assert [line["a"] for line in read_metrics(path)] == [1, 2, 4]


def test_late_values_join_the_last_line_also_after_a_restart(tmp_path):
    for values in ({"a": 1}, {"b": 2}):
        logger = RunLogger(tmp_path, tensorboard=False, resume_step=7)
        logger.scalars(7, values)
        logger.end_line()
        logger.scalars(7, {"c": 3})
        logger.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 7, "a": 1, "c": 3, "b": 2}]


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (75, "1:15"), (3700, "1:01:40"), (59.6, "1:00")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert format_duration(seconds) == text


def test_the_summary_box_is_a_closed_frame_around_every_line():
    box = summary_box("done", {"report": "runs/a/report.html", "look": "tensorboard"}).splitlines()
    assert len({len(line) for line in box}) == 1
    assert box[0] == box[-1] == "+" + "-" * (len(box[0]) - 2) + "+"
    assert "report  runs/a/report.html" in box[2]
