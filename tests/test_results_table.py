"""The numbers in the README and the docs agree with the runs in experiments/."""

import json
import pathlib
import re
import shlex
import subprocess

import pytest

from experiments import fitted_curve, results_table
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(("page", "to_root"), results_table.PAGES.items(), ids=["README", "docs"])
def test_the_tables_of_results_are_made_of_the_kept_runs(page, to_root):
    text = page.read_text()
    assert results_table.with_table(text, to_root) == text, "run experiments/results_table.py"
    table = results_table.results_table(to_root)
    kept = list(results_table.EXPERIMENTS.glob("**/probe.json"))
    assert len(kept) > 4
    for path in kept:
        scores = [
            row["top1"]
            for row in json.loads(path.read_text())["results"]
            if (row["encoder"], row["pool"], row["protocol"]) == ("target", "concat", "linear")
        ]
        name = path.relative_to(results_table.EXPERIMENTS).parts[0]
        line = next(line for line in table.splitlines() if f"`{name}`" in line)
        assert f"{100 * scores[-1]:.1f}" in line


def test_every_row_names_its_commit_and_epochs_and_older_crops_are_marked():
    table = results_table.results_table()
    (stopped,) = [line for line in table.splitlines() if "`cifar10_tiny_agreement`" in line]
    assert "| 15 |" in stopped, "the table must show the epochs that it trained"
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| [`")]
    commits = {row[0].split("`")[1]: row[1] for row in rows}
    assert commits["cifar10_tiny_muon"] == "bac1bbf", "the last of its three commits"
    assert commits["cifar10_tiny_agreement"] == commits["shapes_cifar10_recipe"] == "29b1aaf"
    assert all(re.fullmatch(r"[0-9a-f]{7}( \\\*)?", commit) for commit in commits.values())
    marked = {name for name, commit in commits.items() if commit.endswith("*")}
    assert marked == {"cifar10_patches"}
    assert "bc926dd" in table.splitlines()[-1]
    is_older = ["git", "-C", str(REPOSITORY), "merge-base", "--is-ancestor", "bc926dd"]
    known = ["git", "-C", str(REPOSITORY), "cat-file", "-e", "bc926dd^{commit}"]
    if not subprocess.run(known, capture_output=True, check=False).returncode:  # no shallow clone
        for name, commit in commits.items():
            newer = subprocess.run([*is_older, commit[:7]], check=False).returncode == 0
            assert newer == (name not in marked), name


def test_a_run_without_a_commit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(results_table, "EXPERIMENTS", tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "README.md").write_text("# x")
    with pytest.raises(ValueError, match="needs a line"):
        results_table.commit_of(tmp_path / "x" / "probe.json")


SCRIPTS = r"python (experiments/(?:fitted_curve|results_table)\.py[^`\n]*)"
DOCUMENTED = [
    (page.relative_to(REPOSITORY), shlex.split(command.split("#")[0]))
    for page in sorted(REPOSITORY.glob("experiments/**/*.md"))
    for command in re.findall(SCRIPTS, page.read_text())
]


@pytest.mark.parametrize(
    ("page", "command"),
    DOCUMENTED,
    ids=[f"{page.parent.name}-{i}" for i, (page, _) in enumerate(DOCUMENTED)],
)
def test_commands_of_the_pages_run_on_what_is_kept(page, command, monkeypatch, capsys):
    """Commands with `runs/` need a run. All others must find their files in the repository."""
    assert any("fitted_curve" in command[0] for _, command in DOCUMENTED)
    script, *arguments = command
    if any(argument.startswith("runs/") for argument in arguments):
        pytest.skip("needs a run in runs/")
    monkeypatch.chdir(REPOSITORY)
    if "fitted_curve" in script:
        fitted_curve.main(arguments)
        assert "predicted at epoch" in capsys.readouterr().out
        return
    assert all(pathlib.Path(argument).exists() for argument in arguments), page
