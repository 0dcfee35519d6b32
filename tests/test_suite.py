"""The test suite: no test file is forgotten in a CI leg, and a seed changes the order."""

import itertools
import pathlib
import types

from tests import suite


def test_each_test_file_is_on_exactly_one_of_the_two_lists():
    """A new test file must be added to tests/suite.py."""
    assert not suite.ON_EVERY_JAX & suite.ON_ONE_JAX
    assert suite.test_files() == suite.ON_EVERY_JAX | suite.ON_ONE_JAX
    assert set(suite.LONGEST) <= suite.test_files()


def test_a_seed_changes_the_order_and_loses_no_test():
    items = [
        types.SimpleNamespace(path=pathlib.Path(f"test_{file}.py"), name=f"{file}{number}")
        for file in "abcde"
        for number in range(6)
    ]
    orders = []
    for seed in ("1", "1", "2"):
        shuffled = list(items)
        suite.shuffle(shuffled, seed)
        orders.append([item.name for item in shuffled])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(item.name for item in items)
    files = [name[0] for name in orders[0]]
    assert sum(a != b for a, b in itertools.pairwise(files)) == 4, "a file's tests stay together"
