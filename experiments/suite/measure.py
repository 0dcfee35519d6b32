"""pytest plugin: writes CPU seconds, compilations and processes of each test to a CSV file.

HJEPA_MEASURE=out.csv python -m pytest -n 0 -p experiments.suite.measure tests/test_x.py
python -m experiments.suite.measure out.csv ...    # sums up such files, one line a test file
"""

import csv
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

COLUMNS = [
    "test",
    "wall_sec",
    "cpu_sec",
    "child_cpu_sec",
    "compiles",
    "compile_sec",
    "trace_sec",
    "processes",
]
_counts = {"compiles": 0, "compile_sec": 0.0, "trace_sec": 0.0, "processes": 0}
_PATH = os.environ.get("HJEPA_MEASURE", "suite.csv")


def _listen(event: str, seconds: float, **_: object) -> None:
    if event.endswith("backend_compile_duration"):
        _counts["compiles"] += 1
        _counts["compile_sec"] += seconds
    elif "jaxpr_trace_duration" in event or "jaxpr_to_mlir" in event:
        _counts["trace_sec"] += seconds


def _now() -> list[float]:
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return [
        time.time(),
        own.ru_utime + own.ru_stime,
        children.ru_utime + children.ru_stime,
        *_counts.values(),
    ]


def pytest_configure() -> None:
    import jax

    jax.monitoring.register_event_duration_secs_listener(_listen)
    start = subprocess.Popen.__init__

    def counted(self: subprocess.Popen, *args: object, **kwargs: object) -> None:
        _counts["processes"] += 1
        start(self, *args, **kwargs)  # pyright: ignore[reportCallIssue]

    subprocess.Popen.__init__ = counted
    with open(_PATH, "w", newline="") as file:
        csv.writer(file).writerow(COLUMNS)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = _now()
    yield
    spent = [round(b - a, 3) for a, b in zip(before, _now(), strict=True)]
    with open(_PATH, "a", newline="") as file:
        csv.writer(file).writerow([item.nodeid, *spent])


def main() -> None:
    """Prints the sums of each test file as CSV, the most expensive first."""
    sums: dict[str, list[float]] = {}
    for path in sys.argv[1:]:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                found = sums.setdefault(row["test"].partition("::")[0], [0.0] * len(COLUMNS))
                found[0] += 1
                for i, name in enumerate(COLUMNS[1:], start=1):
                    found[i] += float(row[name])
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["file", "tests", *COLUMNS[1:]])
    for name, values in sorted(sums.items(), key=lambda item: -item[1][2] - item[1][3]):
        out.writerow([name, *(round(value, 1) for value in values)])


if __name__ == "__main__":
    main()
