"""Command-line flags: None, repetition, several workdirs, faulty config files, help."""

import os
import pty
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from hjepa_jax import cli, main
from hjepa_jax.__main__ import COMMANDS
from hjepa_jax.config import base_config
from hjepa_jax.config.fields import field_types, flatten, get_field
from hjepa_jax.config.validation import validate
from hjepa_jax.data.sides import AMOUNT
from hjepa_jax.errors import InputError

SHAPES = "--config=configs/shapes_tiny.py"
KINDS = field_types(base_config())
OPTIONAL = [
    field
    for field, default in flatten(base_config().to_dict()).items()
    if default is None or KINDS[field] == AMOUNT
]


def parse(*arguments, define=lambda values: None):
    """Returns the values of `--config` and other flags after parsing."""
    values, argv = flags.FlagValues(), ["main", *arguments]
    config_flags.DEFINE_config_file("config", None, "", values, lock_config=True, sys_argv=argv)
    define(values)
    cli.parse_flags(argv, values)
    return values


@pytest.fixture
def all_fields_set(tmp_path):
    """A config file that sets every optional field."""
    path = tmp_path / "own.py"
    examples = {int: 1, float: 1.0, str: "x", tuple: (1.0,), AMOUNT: 0.5}
    lines = [f"    c.{field} = {examples[KINDS[field]]!r}" for field in OPTIONAL]
    text = "from hjepa_jax.config import base_config\ndef get_config():\n    c = base_config()\n"
    path.write_text("\n".join([text, *lines, "    return c.lock()\n"]))
    return path


@pytest.mark.parametrize("word", ["None", "none"])
def test_every_optional_field_can_be_set_back_to_none(all_fields_set, word):
    assert len(OPTIONAL) >= 15
    config = parse(f"--config={all_fields_set}").config
    assert all(get_field(config, field) is not None for field in OPTIONAL)
    overrides = [f"--config.{field}={word}" for field in OPTIONAL]
    config = parse(f"--config={all_fields_set}", *overrides).config
    assert {field: get_field(config, field) for field in OPTIONAL} == dict.fromkeys(OPTIONAL)
    validate(config)


def test_the_class_list_of_a_config_can_be_set_to_none():
    config = parse("--config=imagenet100_small", "--config.data.class_list=None").config
    assert config.data.class_list is None


@pytest.mark.parametrize(("text", "value"), [("16", 16), ("0.25", 0.25), ("1e-1", 0.1)])
def test_an_amount_is_a_count_or_a_fraction(text, value):
    found = parse("--config=cifar10_tiny", f"--config.mask.num_context={text}").config
    assert found.mask.num_context == value
    assert type(found.mask.num_context) is type(value)
    validate(found)


@pytest.mark.parametrize(
    ("field", "rule"),
    [("seed", "a whole number"), ("optim.learning_rate", "a number"), ("mask.scale", "a tuple"),
     ("loss.kind", "a string")],
)  # fmt: skip
def test_none_is_refused_for_required_fields(field, rule):
    config = parse(SHAPES, f"--config.{field}=None").config
    with pytest.raises(InputError, match=rf"^{field}=None: must be {rule}"):
        validate(config)


def test_none_stays_a_string_in_fields_that_allow_it():
    config = parse(SHAPES, "--config.model.pyramid=none", "--config.data.dir", "none").config
    assert (config.model.pyramid, config.data.dir) == ("none", None)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.optimizer.kind=adamw", "error: --config.optimizer.kind: is not a field of a co"),
        ("--noconfig.log.raport", "error: --config.log.raport: is not a field of a config; did you "
         "mean --config.log.report?"),
        ("--config.optim.learning_rate=fast", "error: optim.learning_rate='fast': must be a numbe"),
        ("--config.train.batch_size=2.5", "error: train.batch_size='2.5': must be a whole number"),
        ("--config.mask.scale=(1,", "error: mask.scale='(1,': must be a tuple of numbers"),
        ("--config.model=1", "error: model='1': is a group of fields"),
        ("--config.seed[0]=1", "seed[0]"),
        ("--config.data.mean[9]=1", "--config.data.mean[9]: tuple index out of range"),
        ("--config.seed.x=1", "seed.x"),
        ("--config.=1", "--config.: is not a field"),
        ("--config.mask.scale=" + "-" * 9_999 + "1", ""),
        ("--config.data.mean[0]=x", "data.mean[0]='x': must be a number"),
        ("--config.model.width=" + "9" * 5_000, "999...': must be a whole number"),
        ("--config.mask.num_context=half", "mask.num_context='half': must be a whole number, at "),
    ],
    ids=range(14),
)  # fmt: skip
def test_a_bad_override_gives_one_line(argument, words, capsys):
    def parse_and_check() -> None:
        try:
            # The platform decides how deeply nested an expression Python can parse.
            validate(parse(SHAPES, argument).config)
        except InputError as error:
            cli.fail(str(error))

    with pytest.raises(SystemExit) as stop:
        parse_and_check()
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert len(told) < 2_020


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("--config.optim.lr=1", "--config.optim.learning_rate"),
        ("--config.train.learning_rate=1", "--config.optim.learning_rate"),
        ("--config.optimizer.kind=muon", "--config.optim.kind"),
        ("--lr=1", "--config.optim.learning_rate"),
        ("--epochs", "--config.train.num_epochs"),
        ("--batch-size=1", "--config.train.batch_size"),
        ("--workdirs=x", "--workdir"),
    ],
)
def test_a_wrong_name_gets_a_hint_at_the_right_field(argument, hint, capsys):
    with pytest.raises(SystemExit):
        parse(SHAPES, argument, define=define_some)
    told = capsys.readouterr().err
    assert told.startswith(f"error: {argument.partition('=')[0]}: is not a f")
    assert told.endswith(f"; did you mean {hint}?\n")


def define_some(values):
    flags.DEFINE_string("output", None, "", values)
    flags.DEFINE_list("levels", None, "", values)
    flags.DEFINE_bool("images", True, "", values)
    flags.DEFINE_multi_string("workdir", None, "", values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=a", "--output=b"], r"--output='b': is given twice \(--output=a comes before"),
        (["--output", "a", "-output", "b"], r"--output='b': is given twice"),
        (["--levels=0", "--levels=1"], r"--levels='1': .* its values separated by commas"),
        (["--images", "--noimages"], r"--images=.*is given twice \(--images"),
        ([SHAPES, "--config=configs/cifar10_tiny.py"], r"--config='configs/cifar10_tiny.py': is g"),
    ],
)
def test_a_flag_that_is_given_twice_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(*arguments, define=define_some)


def test_the_last_of_repeated_overrides_counts_with_a_note(capsys):
    overrides = ["--config.seed=1", "--config.mask.scale=(0.1,0.1)", "--config.seed=2"]
    config = parse(SHAPES, *overrides, "--config.mask.scale=(0.2,0.2)").config
    assert (config.seed, config.mask.scale) == (2, (0.2, 0.2))
    assert capsys.readouterr().err.splitlines() == [
        "note: --config.seed=1 is replaced by --config.seed=2, which comes later",
        "note: --config.mask.scale=(0.1,0.1) is replaced by --config.mask.scale=(0.2,0.2), "
        "which comes later",
    ]


def test_the_same_value_given_twice_and_repeatable_flags_are_accepted(capsys):
    given = ["--output=a", "--output=a", "--workdir=a", "--workdir=b", SHAPES, "--config.seed=1"]
    values = parse(*given, "--config.seed=1", define=define_some)
    assert (values.output, values.workdir, values.config.seed) == ("a", ["a", "b"], 1)
    assert capsys.readouterr().err == ""


def test_workdirs_configs_and_inputs_may_be_positional():
    values = flags.FlagValues()
    define_some(values)
    cli.parse_flags(["probe", "a", "--output", "x", "b", "--noimages", "c", "--workdir=d"], values)
    assert values.workdir == ["a", "b", "c", "d"]
    assert (values.output, values.images) == ("x", False)
    assert parse("shapes_tiny", "--config.seed", "3").config.seed == 3
    with pytest.raises(InputError, match="--config='b': is given twice"):
        parse("shapes_tiny", "b")
    values = flags.FlagValues()
    flags.DEFINE_multi_string("input", None, "", values)
    define_some(values)  # `embed`: arguments are its inputs
    cli.parse_flags(["embed", "a.jpg", "--workdir=r", "b.jpg,c.jpg"], values)
    assert (values.workdir, values.input) == (["r"], ["a.jpg", "b.jpg,c.jpg"])
    assert cli.separated("--input", values.input) == ["a.jpg", "b.jpg", "c.jpg"]


def test_workdirs_may_be_repeated_or_listed_and_contain_commas(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a", "b", "c,d", "it's here"):
        (tmp_path / name).mkdir()
    given = [f"{tmp_path}/a,{tmp_path}/b", f"{tmp_path}/c,d", "~/it's here"]
    assert cli.workdirs(given) == [tmp_path / name for name in ("a", "b", "c,d", "it's here")]


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (["runs/a", "./runs/a"], "given twice"), (["runs/a,runs/a"], "given twice"),
        ([""], "not empty"), (["runs/a,"], "not empty"), (["gs://bucket/run"], "not an address"),
        (["file:///runs/a"], "not an address"), (["~nobody-of-this-name/x"], "no user here"),
    ],
)  # fmt: skip
def test_an_invalid_workdir_is_refused(given, rule):
    with pytest.raises(InputError, match=rf"^--workdir=.*{rule}"):
        cli.workdirs(given)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ndef get_config(:\n", "own.py:2: SyntaxError: "),
        ("def get_config():\n  return\n    2\n", "own.py:3: IndentationError: "),
        ("def get_config():\n\n  return undefined\n", "own.py:3: NameError: name 'undefined'"),
        ("import nowhere_at_all\n", "own.py:1: ModuleNotFoundError: "),
        ("def get_config():\n  raise OSError(2, 'gone')\n", "own.py:2: FileNotFoundError: "),
        ("def get_config():\n  raise ValueError('no\\nlines')\n", "own.py:2: ValueError: no)"),
        ("def get_config():\n  return 1 / 0\n", "own.py:2: ZeroDivisionError: "),
        ("def get_config():\n  assert False, 'never'\n", "own.py:2: AssertionError: never"),
        ("import sys\nsys.exit('bye')\n", "own.py:2: SystemExit: bye"),
        ("def get_config(size):\n  return size\n", "TypeError: get_config() missing 1 required"),
        ("def config():\n  pass\n", "has no function get_config"),
        ("def get_config():\n  return {'seed': 0}\n", "must return an ml_collections.ConfigDict"),
        ("from hjepa_jax.config import base_config\ndef get_config():\n  c = base_config().lock()\n"
         "  c.optim.rate = 1\n  return c\n", "own.py:4: AttributeError: "),
        ("import helper_of_own\n", "helper_of_own.py:3: KeyError: 'x'"),
    ],
)  # fmt: skip
def test_an_error_in_a_config_file_keeps_its_file_and_line(tmp_path, monkeypatch, text, words):
    (tmp_path / "helper_of_own.py").write_text("d = {}\n\nd['x']\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        parse(f"--config={path}")
    assert str(refused.value).startswith(f"--config='{path}': must be a config file (")
    assert words in str(refused.value)


def test_a_config_file_may_be_in_the_home_folder_and_use_dataclasses(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\nimport dataclasses\n"
        "from hjepa_jax.config import base_config\n\n"
        "@dataclasses.dataclass\nclass Size:\n  width: int = 48\n\n"
        "def get_config(seed='0'):\n  c = base_config()\n  c.seed = int(seed)\n"
        "  c.model.width = Size().width\n  return c\n"
    )
    config = parse("--config=~/own.py:3").config
    assert (config.seed, config.model.width, config.is_locked) == (3, 48, True)


def run_python(code, **kwargs):
    command = [sys.executable, "-c", f"from hjepa_jax import cli\n{code}"]
    return subprocess.run(command, text=True, capture_output=True, check=False, **kwargs)


def test_unprintable_names_are_escaped_and_closed_output_is_not_reused(tmp_path):
    code = """
def main():
    import sys, os
    print("caf\\udce9", "\\u65e5", flush=True)
    os.close(1)
    cli._prepare_output()
    assert open("beside", "w").fileno() > 2
    print("to nobody")
cli.run(main)
"""
    done = run_python(code, env={**os.environ, "PYTHONIOENCODING": "ascii"}, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\udce9 \\u65e5\n", "")
    assert (tmp_path / "beside").read_text() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_full_disk_is_an_error_on_stdout_only():
    with open("/dev/full", "w") as full:
        output = cli._Output(os.dup(full.fileno()), required=True)
        with pytest.raises(InputError, match=r"^stdout=1: cannot be written \(No space left"):
            output.write(b"x")
        assert output.write(b"dropped from now on") == 19
        assert cli._Output(os.dup(full.fileno()), required=False).write(b"x") == 1


def test_no_line_on_a_terminal_overwrites_another(monkeypatch):
    ours, terminal = pty.openpty()
    monkeypatch.setattr(cli._Output, "before", b"")
    out, err = (cli._Output(terminal, required=required) for required in (True, False))
    for stream, text in (
        (out, "\rstep 1\033[K"), (out, "\rstep 2\033[K"), (err, "a warning\n"), (out, "a note\n"),
        (err, "\rbar 10 %"), (err, "\r        "), (out, "a table\n"),
    ):  # fmt: skip
        stream.write(text.encode())
    shown = (
        "\rstep 1\033[K\rstep 2\033[K\r\na warning\r\na note\r\n\rbar 10 %\r        \ra table\r\n"
    )
    found = b""
    while len(found) < len(shown):  # one read may return only a part
        found += os.read(ours, 1000)
    assert found.decode() == shown


def test_a_closed_terminal_is_ignored():
    terminal, ours = pty.openpty()
    os.close(terminal)
    assert cli._Output(ours, required=True).write(b"x") == 1


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OSError(28, "No space left on device", "runs/a"), 2, "error: runs/a: No space left"),
        (OSError(24, "Too many open files"), 2, "error: Too many open files"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_of_the_system_and_ctrl_c_give_one_line(error, status, line, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(cli, "_prepare_output", lambda: None)
    monkeypatch.setattr(cli.app, "run", fail)
    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main.main)
    assert stop.value.code == status
    told = capsys.readouterr().err
    assert told.startswith(line)
    assert told.count("\n") == 1


def test_a_setting_that_jax_refuses_gives_one_line():
    environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "high-ish"}
    done = run_python("cli.run(lambda: None)", env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX_DEFAULT_MATMUL_PRECISION='high-ish': JAX does not st")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull", "-?"])
def test_help_is_a_page_with_status_0(flag, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main", flag])
    monkeypatch.setattr(cli, "_prepare_output", lambda: None)
    cli.run(main.main)  # returns, so the exit status is 0; a SystemExit would fail the test
    page = capsys.readouterr().out
    assert page.startswith("Trains the run that a config describes.")
    assert "\n  --workdir              The run's directory" in page
    assert "\n  --[no]dry_run          Print" in page
    assert "`hjepa config NAME`" in page


@pytest.mark.parametrize("command", [c for c, _ in COMMANDS.values()])
def test_the_help_of_a_command_fits_a_screen(command, run_module):
    page = run_module(f"hjepa_jax.{command}", "--help")
    assert page.returncode == 0
    lines = page.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 50
    assert "--[no]help" not in page.stdout
