"""Errors name an existing config field, flag or function argument."""

import ast
import pathlib
import re

import pytest

from hjepa_jax.config.defaults import REMOVED_FIELDS, base_config
from hjepa_jax.config.fields import flatten

PACKAGE = pathlib.Path(__file__).parent.parent / "hjepa_jax"
FIELDS = {*flatten(base_config().to_dict())}
GROUPS = {field.partition(".")[0] for field in FIELDS if "." in field}
# Python code in documentation, and file names, look like fields.
NOT_FIELDS = re.compile(r"\.(py|json|jsonl|npz|pkl|png|safetensors|stablehlo|onnx|apply)$|\($")
TREES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")
}


def flag_names():
    """Yields the names of all flags that the commands define."""
    calls = (n for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.Call))
    for call in calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr.startswith("DEFINE_"):
            for argument in call.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield f"--{argument.value}"


FLAGS = {*flag_names()}


def arguments(tree):
    """Returns the argument names of all functions in a module."""
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return {a.arg for f in functions for a in (*f.args.args, *f.args.kwonlyargs)}


def raised_fields(tree):
    """Yields the literal field names passed to `InputError` and to `check` in `validation`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            named = {"InputError": node.args[:1], "check": node.args[1:2]}.get(node.func.id, ())
            yield from (a.value for a in named if isinstance(a, ast.Constant))


@pytest.mark.parametrize("module", TREES)
def test_every_error_names_a_field_a_flag_or_an_argument(module):
    tree = TREES[module]
    known = FIELDS | FLAGS | arguments(tree) | {"stdout"}
    unknown = {f for f in raised_fields(tree) if f not in known and f.split(".")[0] not in known}
    groups = {field for field in raised_fields(tree) if field.split(".")[0] in GROUPS} - FIELDS
    assert not unknown | groups


@pytest.mark.parametrize("module", TREES)
def test_every_config_field_in_a_text_exists(module):
    strings = [n.value for n in ast.walk(TREES[module]) if isinstance(n, ast.Constant)]
    text = "\n".join(s for s in strings if isinstance(s, str))
    found = re.findall(rf"(?<![\w./])(?:{'|'.join(GROUPS)})\.[a-z_0-9]+\b\(?", text)
    assert {f for f in found if not NOT_FIELDS.search(f)} <= FIELDS | REMOVED_FIELDS.keys()
