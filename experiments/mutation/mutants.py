"""Mutation check of the suite: small faults in the code, and whether the tests notice them.

    python experiments/mutation/mutants.py choose DIR DIR ... > experiments/mutation/mutants.csv
    python experiments/mutation/mutants.py run DIR --suite=after --out=results.csv

`choose` lists faults that can be made in all of several checkouts. Every comparison, arithmetic
operator, small number and call statement gives one; `--per_module` of a module are taken at even
distances. A fault is known by its function and the text of its line, so it is found again after the
code has moved. `run` makes one fault at a time in a copy of a checkout and runs the tests of its
module until the first one fails: the quick ones, then the slow ones. Faults that the CSV file lists
already are not run again.
"""

import argparse
import ast
import csv
import importlib
import os
import pathlib
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from typing import Any, NamedTuple

LIST = pathlib.Path(__file__).with_name("mutants.csv")
LIMIT_SEC = 900  # for quick or slow tests of one mutant: a fault may make them hang
# Module: its files, before and after the package got folders; and the tests, the cheapest first.
MODULES = {
    "losses": (["losses", "method/losses"], ["test_losses", "test_agreement"]),
    "objective": (["objective", "method/objective"], ["test_agreement", "test_steps"]),
    "steps": (["steps", "method/step", "method/keys", "method/embed"], ["test_steps"]),
    "optimizer": (["optimizer", "method/optimizer", "method/muon"], ["test_optimizer"]),
    "masking": (
        ["masking", "masks/samplers", "masks/masks", "masks/choice", "masks/random_mask"],
        ["test_masking"],
    ),
    "blocks": (["blocks", "masks/blocks"], ["test_masking"]),
    "checkpoint": (
        [
            "checkpoint",
            "runs/checkpoint",
            "runs/checkpoint_meta",
            "runs/newest_checkpoint",
            "runs/load",
        ],
        ["test_checkpoint", "test_warm_start"],
    ),
    "knn": (["evaluation/knn"], ["test_knn", "test_labelled"]),
    "linear": (["evaluation/linear", "evaluation/logistic"], ["test_linear", "test_labelled"]),
    "protocols": (["evaluation/protocols"], ["test_protocols"]),
}
LIBRARIES = [  # imported once; every mutant is a fork of the process that has them
    "beartype", "flax.linen", "hypothesis", "jax", "jaxtyping", "ml_collections", "optax",
    "orbax.checkpoint", "PIL.Image", "pytest", "scipy.optimize", "sklearn.linear_model", "xdist",
]  # fmt: skip

COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*",
    ast.Pow: "*", ast.BitAnd: "|", ast.BitOr: "&", ast.MatMult: "@ -1 *",
}  # fmt: skip


class Key(NamedTuple):
    """The text that tells a mutant from all others, wherever its function stands."""

    module: str
    function: str
    line: str
    original: str
    mutant: str
    nth: str  # number among equal ones


class Place(NamedTuple):
    """The bytes of a file that a mutant replaces."""

    path: pathlib.Path
    start: int
    end: int


def replacement(node: ast.AST, source: Any) -> str | None:
    """The faulty text for a node, or None if the node gives no fault."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = source(node.left), source(node.comparators[0])
        return f"({left} {COMPARISONS[type(node.ops[0])]} {right})"
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return f"(({source(node.left)}) {OPERATORS[type(node.op)]} ({source(node.right)}))"
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        return repr(not node.value if isinstance(node.value, bool) else node.value + 1)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return f"({source(node.operand)})"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return "pass"
    return None


def mutants_of_file(module: str, path: pathlib.Path, seen: Counter) -> dict[Key, Place]:
    """All mutants of a file, in the order of the text."""
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def span(node: Any) -> tuple[int, int]:
        first, last = starts[node.lineno - 1], starts[node.end_lineno - 1]
        return first + node.col_offset, last + node.end_col_offset

    def source(node: Any) -> str:
        start, end = span(node)
        return data[start:end].decode()

    found = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        if (mutant := replacement(node, source)) is not None:
            line = lines[node.lineno - 1].decode().strip()  # pyright: ignore
            found.append((*span(node), (module, function, line, source(node), mutant)))
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child, function)

    visit(ast.parse(data), "")
    mutants = {}
    for start, end, key in sorted(found):
        mutants[Key(*key, str(seen[key]))] = Place(path, start, end)
        seen[key] += 1
    return mutants


def mutants_of(module: str, repository: pathlib.Path) -> dict[Key, Place]:
    """All mutants of a module, from the files that exist."""
    seen, mutants = Counter(), {}
    for name in MODULES[module][0]:
        path = repository / "hjepa_jax" / f"{name}.py"
        if path.exists():
            mutants |= mutants_of_file(module, path, seen)
    return mutants


def choose(repositories: list[pathlib.Path], per_module: int) -> list[Key]:
    """`per_module` mutants of each module that all checkouts have."""
    chosen = []
    for module in MODULES:
        first, *others = (mutants_of(module, repository) for repository in repositories)
        common = [key for key in first if all(key in other for other in others)]
        count = min(per_module, len(common))
        chosen += [common[(2 * i + 1) * len(common) // (2 * count)] for i in range(count)]
    return chosen


def run_tests(copy: pathlib.Path, tests: list[str], output: pathlib.Path) -> int:
    """Runs pytest in a fork of this process; returns its status, or -1 at the time limit."""
    child = os.fork()
    if child == 0:
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            files = [f"tests/{n}.py" if n.startswith("test_") else n for n in tests]
            options = ["-n", "0", "-x", "-rfE", "-p", "no:cacheprovider"]
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
            os._exit(int(importlib.import_module("pytest").main([*options, *files])))
        except BaseException:
            traceback.print_exc()
            os._exit(70)
    deadline = time.monotonic() + LIMIT_SEC
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


def is_killed(place: Place, mutant: str, copy: pathlib.Path, tests: list[str]) -> tuple[bool, str]:
    """Runs the tests on a mutant; returns whether one failed, and which."""
    before, output = place.path.read_bytes(), copy / "output.txt"
    place.path.write_bytes(before[: place.start] + mutant.encode() + before[place.end :])
    try:
        status = run_tests(copy, ["-m", "not slow", *tests], output)
        if status in (0, 5):  # 5: these files have no such tests
            status = run_tests(copy, ["-m", "slow", *tests], output)
    finally:
        place.path.write_bytes(before)
    if status == 5:
        return False, ""
    if status == -1:
        return True, "time limit"
    lines = output.read_text(errors="replace").splitlines()
    if status == 70:
        raise RuntimeError("\n".join(lines))
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED", "ERROR "))]
    return status != 0, failed[0] if failed else f"status {status}" if status else ""


def run(repository: pathlib.Path, suite: str, out: pathlib.Path, modules: list[str]) -> None:
    """Adds to the CSV file `out` one line for each mutant of the list."""
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    with LIST.open(newline="") as file:
        keys = [Key(*row) for row in list(csv.reader(file))[1:]]
    done: set[tuple[str, ...]] = set()
    if out.exists():
        with out.open(newline="") as file:
            done = {tuple(row[:-2]) for row in csv.reader(file)}
    else:
        with out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(["suite", *Key._fields, "killed", "by"])
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "repository")
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache")
        shutil.copytree(repository, copy, ignore=ignored)
        # Programs that no fault touches are compiled once for all mutants.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(folder, "programs"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
        os.environ["JAX_PLATFORMS"] = "cpu"
        for library in LIBRARIES:
            importlib.import_module(library)
        for module in modules:
            places, tests = mutants_of(module, copy), MODULES[module][1]
            if run_tests(copy, [*tests, "--collect-only"], copy / "output.txt") != 0:
                raise RuntimeError((copy / "output.txt").read_text())
            for key in (key for key in keys if key.module == module):
                if (suite, *key) in done:
                    continue
                result = (False, "absent")
                if key in places:
                    result = is_killed(places[key], key.mutant, copy, tests)
                with out.open("a", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerow([suite, *key, *result])
                print(
                    module, key.line, "killed" if result[0] else "SURVIVED", result[1], flush=True
                )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    chooser = commands.add_parser("choose")
    chooser.add_argument("repositories", type=pathlib.Path, nargs="+")
    chooser.add_argument("--per_module", type=int, default=8)
    runner = commands.add_parser("run")
    runner.add_argument("repository", type=pathlib.Path)
    runner.add_argument("--suite", required=True, help="name of the suite in the CSV file")
    runner.add_argument("--out", type=pathlib.Path, required=True, help="CSV file to add to")
    runner.add_argument("--only", nargs="*", default=list(MODULES), help="modules")
    given = parser.parse_args()
    if given.command == "choose":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([Key._fields, *choose(given.repositories, given.per_module)])
    else:
        run(given.repository.resolve(), given.suite, given.out, given.only)


if __name__ == "__main__":
    main()
