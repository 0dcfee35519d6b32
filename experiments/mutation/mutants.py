"""Mutation check of the suite: small faults in the code, and whether the tests notice them.

    python experiments/mutation/mutants.py --out=results.csv [--repository=DIR] [--only=losses]

The mutants of a module are fixed by its text: every comparison, arithmetic operator, small number
and call statement gives one; `PER_MODULE` of them are taken at even distances. Each is put into a
copy of the repository, where the tests of the module run until the first one fails. A line of the
CSV file is one mutant; those that are there already are not run again.
"""

import argparse
import ast
import csv
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

REPOSITORY = pathlib.Path(__file__).parent.parent.parent
PER_MODULE = 8
LIMIT_SEC = 1800  # of one mutant; one that makes the tests hang is killed by that
MODULES = {  # module of hjepa_jax: the test files that are about it, the cheapest first
    "losses": ["test_losses"],
    "objective": ["test_steps", "test_agreement"],
    "steps": ["test_steps"],
    "optimizer": ["test_optimizer"],
    "masking": ["test_masking"],
    "blocks": ["test_masking"],
    "checkpoint": ["test_checkpoint", "test_warm_start"],
    "evaluation/knn": ["test_knn"],
    "evaluation/linear": ["test_linear"],
    "evaluation/protocols": ["test_protocols"],
}
COLUMNS = ["suite", "module", "line", "column", "original", "mutant", "killed", "by"]

COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*",
    ast.Pow: "*", ast.BitAnd: "|", ast.BitOr: "&", ast.MatMult: "@ -1 *",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A piece of a file and what stands in its place."""

    module: str
    start: int
    end: int
    line: int
    column: int
    original: str
    replacement: str

    @property
    def key(self) -> tuple[str, ...]:
        """What tells a mutant from all others, as in the CSV file."""
        place = (str(self.line), str(self.column))
        return (self.module, *place, self.original, self.replacement)


def mutants_of(module: str, text: str) -> list[Mutant]:
    """All mutants of a module, in the order of the text."""
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    data, found, skipped = text.encode(), [], set()

    def offset(node: ast.expr | ast.stmt, *, end: bool = False) -> int:
        if end:
            return starts[node.end_lineno - 1] + node.end_col_offset
        return starts[node.lineno - 1] + node.col_offset

    def add(node: ast.expr | ast.stmt, replacement: str) -> None:
        start, end = offset(node), offset(node, end=True)
        original = data[start:end].decode()
        found.append(
            Mutant(module, start, end, node.lineno, node.col_offset, original, replacement)
        )

    def source(node: ast.expr) -> str:
        return data[offset(node) : offset(node, end=True)].decode()

    tree = ast.parse(text)
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if annotation := getattr(node, name, None):
                skipped |= {id(part) for part in ast.walk(annotation)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = source(node.left), source(node.comparators[0])
            add(node, f"({left} {COMPARISONS[type(node.ops[0])]} {right})")
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = source(node.left), source(node.right)
            add(node, f"(({left}) {OPERATORS[type(node.op)]} ({right}))")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            other = not node.value if isinstance(node.value, bool) else node.value + 1
            add(node, repr(other))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            add(node, f"({source(node.operand)})")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            add(node, "pass")
    return sorted(found, key=lambda m: (m.start, m.end))


def chosen(module: str, text: str, count: int) -> list[Mutant]:
    """`count` of the mutants of a module, at even distances."""
    every = mutants_of(module, text)
    count = min(count, len(every))
    return [every[(2 * i + 1) * len(every) // (2 * count)] for i in range(count)]


def is_killed(copy: pathlib.Path, mutant: Mutant, tests: list[str]) -> tuple[bool, str]:
    """Runs the tests on a mutant; returns whether one failed, and which."""
    path = copy / "hjepa_jax" / f"{mutant.module}.py"
    before = path.read_bytes()
    changed = before[: mutant.start] + mutant.replacement.encode() + before[mutant.end :]
    path.write_bytes(changed)
    files = [f"tests/{name}.py" for name in tests]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT_SEC
        )
    except subprocess.TimeoutExpired:
        return True, "time limit"
    finally:
        path.write_bytes(before)
    if done.returncode not in (0, 1, 2, 4):  # 2, 4: the tests cannot even be collected
        return True, f"status {done.returncode}"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    name = failed[0].split()[1] if failed else ("collection" if done.returncode else "")
    return done.returncode != 0, name


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="CSV file to add to")
    parser.add_argument("--repository", type=pathlib.Path, default=REPOSITORY)
    parser.add_argument("--suite", default="after", help="name of the suite in the CSV file")
    parser.add_argument("--only", nargs="*", default=list(MODULES), help="modules")
    parser.add_argument("--per_module", type=int, default=PER_MODULE)
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    given = parser.parse_args()
    done = set()
    if given.out.exists():
        with given.out.open(newline="") as file:
            done = {(r["suite"], *(r[c] for c in COLUMNS[1:6])) for r in csv.DictReader(file)}
    else:
        with given.out.open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "repository")
        ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".*_cache")
        shutil.copytree(given.repository, copy, ignore=ignored)
        for module in given.only:
            text = (copy / "hjepa_jax" / f"{module}.py").read_text()
            for mutant in chosen(module, text, given.per_module):
                if given.list:
                    print(module, mutant.line, mutant.original, "->", mutant.replacement)
                if given.list or (given.suite, *mutant.key) in done:
                    continue
                killed, by = is_killed(copy, mutant, MODULES[module])
                with given.out.open("a", newline="") as file:
                    csv.writer(file).writerow([given.suite, *mutant.key, killed, by])
                print(module, mutant.line, "killed" if killed else "SURVIVED", by, flush=True)


if __name__ == "__main__":
    main()
