"""Names with any characters are readable in figures, pages and files, and never cause a crash."""

import json
import pathlib
import shlex
import types

import numpy as np
import pytest
from markdown_it import MarkdownIt

from hjepa_jax.config import base_config
from hjepa_jax.main import summary
from hjepa_jax.reporting import figures, image_figures, page, projector
from hjepa_jax.runs.logger import RunLogger
from hjepa_jax.runs.record import RunRecord
from hjepa_jax.runs.workdir import prepare_workdir
from hjepa_jax.runtime.names import printable

RECORD = RunRecord(
    num_images=2560, num_steps=200, steps_per_epoch=10, class_names=("caf\udce9",),
    data={"source": "folder:caf\udce9", "fingerprint": "all-0"}, preprocessing={},
)  # fmt: skip
# Each name, and the text that is shown for it.
UNCHANGED = (
    "$x_1$", "un$balanced", r"a\$b$", "$^{$", "_hidden", "日本", "<script>x()</script>", "a|b",
    "`code`", "[link](x) ![p](y)", "**bold** __init__ &amp;", r"back\slash",
)  # fmt: skip
NAMES = {name: name for name in UNCHANGED} | {
    "caf\udce9": "caf\ufffd",
    "two\nlines\tand\x1b[31m": "two lines and [31m",
}


def drawn(text):
    """Returns the text that matplotlib draws, and checks that it is not read as a formula."""
    words, is_formula = text._preprocess_math(text.get_text())
    assert is_formula is False
    return words.strip()


def test_class_names_in_figures_are_drawn_as_they_are():
    labels, names = np.arange(len(NAMES)), [*NAMES]
    confusion = figures.confusion_matrix(labels, labels, names)
    scattered = figures.scatter_maps({"PCA": np.eye(len(NAMES), 2)}, labels, names)
    lines = {name: ([1, 2], [1.0, 2.0]) for name in names}
    curves = figures.curves([figures.Panel("Loss", "nats", lines, log=True)])
    found = np.zeros((len(NAMES), 1, 4, 4, 3))
    near = image_figures.neighbours(found[:, 0], found, names, [[True]] * len(NAMES))
    for figure in (confusion, scattered, curves, near):
        assert figures.pixels(figure).size
    for texts in (
        confusion.axes[0].get_xticklabels(),
        confusion.axes[0].get_yticklabels(),
        scattered.axes[0].get_legend().get_texts(),
        curves.axes[0].get_legend().get_texts(),
        [axes.title for axes in near.axes[: len(NAMES)]],
    ):
        assert [drawn(text) for text in texts] == [*NAMES.values()]


def test_a_long_name_leaves_room_for_the_figure():
    assert len(figures.plain("x" * 300)) == figures.MAX_NAME
    assert figures.png(figures.confusion_matrix(np.arange(2), np.arange(2), ["x" * 300, "b"]))


@pytest.mark.parametrize(("name", "shown"), NAMES.items())
def test_names_in_pages_are_text_and_not_markup(name, shown):
    text = f"# {page.escape(name)}\n\n"
    text += page.table([page.escape(name), "n"], [[page.code(name), 1]])
    tokens = MarkdownIt("commonmark", {"html": False}).enable("table").parse(text)
    heading, head, _, cell, _ = [token for token in tokens if token.type == "inline"]
    for token in (heading, head):
        assert {child.type for child in token.children} <= {"text", "text_special"}
        assert "".join(child.content for child in token.children) == shown
    assert [(child.type, child.content) for child in cell.children] == [("code_inline", shown)]
    html = page.to_html(text, title=name, pictures={})
    assert "<script" not in html
    html.encode()


def test_labels_of_the_projector_have_one_line_each(tmp_path):
    images = np.zeros((len(NAMES), 4, 4, 3), np.uint8)
    projector.write_projector(tmp_path, {"x": np.eye(len(NAMES), 2)}, [*NAMES], images)
    labels = (tmp_path / "projector/labels.tsv").read_text(encoding="utf-8").split("\n")
    assert labels == [*NAMES.values(), ""]


def test_texts_for_tensorboard_can_be_encoded(tmp_path, monkeypatch):
    written, logger = [], RunLogger(tmp_path, tensorboard=False)
    keep = lambda *args: written.extend(args[-1:])
    logger._writer = types.SimpleNamespace(write_texts=keep, close=keep)
    logger.texts(0, {"config": "caf\udce9\nline"})
    logger.close()
    assert written == [{"config": "caf\ufffd\nline"}]
    api = pytest.importorskip("tensorboard.plugins.hparams.api")
    monkeypatch.setattr(api, "hparams", lambda values, trial_id: written.append((values, trial_id)))
    logger = RunLogger(tmp_path, tensorboard=True)
    logger.hparams("caf\udce9", {"data.source": "folder:caf\udce9", "seed": 0})
    logger.close()
    assert written[1:] == [({"data.source": "folder:caf\ufffd", "seed": 0}, "caf\ufffd")]


def test_every_character_is_printable_and_on_one_line():
    everything = "".join(map(chr, range(0x3000))) + "\ud800\udfff\U0001f600"
    assert len(printable(everything).splitlines()) == 1
    printable(everything).encode()


@pytest.mark.parametrize("name", ["my run", "a,b", "it's", "$HOME", "semi;colon", "日本"])
def test_printed_commands_run_as_printed(tmp_path, name):
    workdir = tmp_path / name
    prepare_workdir(base_config(), workdir, RECORD)
    lines = summary(workdir).splitlines()
    for command, flag in (("probe", "--workdir="), ("embed", "--workdir="), ("tensorboard", "")):
        line = next(line for line in lines if command in line and str(tmp_path) in line)
        assert f"{flag}{workdir}" in shlex.split(line.strip("| "))


def test_config_json_holds_names_of_any_bytes(tmp_path):
    config = base_config()
    config.data.source = "folder:caf\udce9"
    prepare_workdir(config, tmp_path, RECORD)
    text = pathlib.Path(tmp_path / "config.json").read_text(encoding="utf-8")
    assert json.loads(text)["data"]["source"] == "folder:caf\udce9"
