"""What devices send each other in a compiled program, read from its HLO text."""

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
    """By kind of collective: how many there are, and the bytes of their results on one device.

    Results, not traffic: of n devices in a ring each sends 2 (n - 1) / n of an all-reduce's result,
    (n - 1) / n of an all-gather's, n - 1 times that of a reduce-scatter. A collective within a loop
    is counted once.
    """
    found: dict[str, dict[str, int]] = {}
    for operation in OPERATION.finditer(hlo):
        entry = found.setdefault(operation["kind"], {"count": 0, "bytes": 0})
        entry["count"] += 1
        for array in ARRAY.finditer(operation["result"]):
            shape = [int(n) for n in array["shape"].split(",") if n]
            entry["bytes"] += SIZES[array["type"]] * math.prod(shape)
    return found
