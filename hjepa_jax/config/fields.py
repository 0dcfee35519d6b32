"""Fields of nested dicts by their dotted names ("model.width"), and the types of their values."""

from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict, FieldReference

from hjepa_jax.data.sides import AMOUNT, SIDES
from hjepa_jax.errors import InputError

# Largest absolute value of a number in a config: steps are counted in int32.
MAX_NUMBER = 2**31 - 1


def amount(default: float | None) -> Any:
    """Returns a field of type `AMOUNT`."""
    return FieldReference(default, field_type=AMOUNT)


def sides(default: int) -> Any:
    """Returns a field of type `SIDES`."""
    return FieldReference(default, field_type=SIDES)


RULES = {
    SIDES: f"must be a whole number, or two: (height, width), each at most {MAX_NUMBER}",
    AMOUNT: f"must be a whole number, at most {MAX_NUMBER}, or a fraction in (0, 1), or None",
    bool: "must be true or false",
    int: f"must be a whole number, at most {MAX_NUMBER} in size",
    float: f"must be a number, finite and at most {MAX_NUMBER} in size",
    str: "must be a string",
    tuple: f"must be a tuple of numbers, finite and at most {MAX_NUMBER} in size",
}


def check_types(config: ConfigDict, defaults: ConfigDict) -> None:
    """Checks that a config has exactly the fields of `defaults`, with their types.

    Only an `AMOUNT` and a field that is None in `defaults` may be None. The rules that are checked
    afterwards can rely on these types.

    Raises:
      InputError: naming the first field that breaks this rule.
    """
    expected, found = flatten(defaults.to_dict()), flatten(config.to_dict())
    for field in sorted(expected.keys() ^ found.keys()):
        rule = "is missing" if field in expected else "is not a field of a config"
        raise InputError(field, found.get(field), rule)
    kinds = field_types(defaults)
    for field, default in expected.items():
        value, kind = get_field(config, field), kinds[field]
        if not (is_a(kind, value) or (value is None and default is None)):
            raise InputError(field, value, RULES[kind])


def field_types(defaults: ConfigDict) -> dict[str, Any]:
    """Returns the type of each field by dotted name; for a None default, the type of its values."""
    types = {}
    for field in flatten(defaults.to_dict()):
        section, _, name = field.rpartition(".")
        types[field] = (get_field(defaults, section) if section else defaults).get_type(name)
    return types


def is_a(kind: Any, value: Any) -> bool:
    """Whether a field of type `kind` may hold `value`."""
    if kind is tuple:  # it may also contain strings: the name of a schedule
        return isinstance(value, tuple) and all(is_a(float, v) or is_a(str, v) for v in value)
    if kind == SIDES:
        numbers = value if isinstance(value, tuple) and len(value) == 2 else (value,)
        return all(is_a(int, number) for number in numbers)
    if kind == AMOUNT:
        return value is None or is_a(int, value) or (is_a(float, value) and 0 < value < 1)
    if kind in (int, float):  # bool is a subclass of int; NaN fails the comparison
        allowed = (int, float) if kind is float else int
        is_number = isinstance(value, allowed) and not isinstance(value, bool)
        return is_number and abs(value) <= MAX_NUMBER
    return isinstance(value, kind)


def get_field(config: Any, field: str) -> Any:
    """The value of a dotted field name."""
    value = config
    for name in field.split("."):
        value = value[name]
    return value


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Returns {"model": {"name": ...}} as {"model.name": ...}; tuples become lists, as in JSON."""
    flat = traverse_util.flatten_dict(config, sep=".")
    return {name: list(x) if isinstance(x, tuple) else x for name, x in flat.items()}
