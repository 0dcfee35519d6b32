"""Exchanges between devices in a compiled program, read from its HLO text."""

import math
import re

# Bytes of an element, by its name in HLO.
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "u64": 8}
OPERATION = re.compile(
    r" = (?P<result>\(.*?\)|\S+) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
)
ARRAY = re.compile(r"(?P<type>[a-z]+\d*)\[(?P<shape>[\d,]*)\]")


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Returns number and bytes of the results on one device, for each kind of collective.

    Results are not traffic. In a ring of n devices, each sends 2 (n - 1) / n of the result of an
    all-reduce, (n - 1) / n of an all-gather, and n - 1 times the result of a reduce-scatter. A
    collective within a loop is counted once.
    """
    found: dict[str, dict[str, int]] = {}
    for operation in OPERATION.finditer(hlo):
        entry = found.setdefault(operation["kind"], {"count": 0, "bytes": 0})
        entry["count"] += 1
        for array in ARRAY.finditer(operation["result"]):
            shape = [int(n) for n in array["shape"].split(",") if n]
            entry["bytes"] += SIZES[array["type"]] * math.prod(shape)
    return found
