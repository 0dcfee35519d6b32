"""Messages about wrong flags and fields, with the name that the user probably means."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from hjepa_jax.errors import InputError

MAX_VALUE = 200  # characters of a value quoted in a message
# Names that other programs use, and the field of the same meaning.
SYNONYMS = {
    "batch": "train.batch_size", "batch_size": "train.batch_size", "bs": "train.batch_size",
    "clip": "optim.clip_norm",
    "dataset": "data.source", "device": "platform", "dim": "model.width",
    "embed_dim": "model.width", "ema": "optim.ema_momentum", "epochs": "train.num_epochs",
    "heads": "model.num_heads", "layers": "model.depth", "levels": "model.num_levels",
    "lr": "optim.learning_rate", "momentum": "optim.ema_momentum", "optimizer": "optim.kind",
    "precision": "model.dtype", "resolution": "data.image_size", "resume": "train.init_from",
    "steps": "train.num_steps", "warmup": "optim.warmup_epochs", "wd": "optim.weight_decay",
    "workers": "data.num_workers",
}  # fmt: skip


def did_you_mean(prefix: str, near: Sequence[str]) -> str:
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def field_like(name: str) -> list[str]:
    """Returns the config field that a user probably means by `name`, in a list; [] if unknown."""
    known, last = config_types(), name.rpartition(".")[2].lower().replace("-", "_")
    if last in SYNONYMS:
        return [SYNONYMS[last]]
    same = [field for field in known if field.rpartition(".")[2] in (last, f"num_{last}")]
    found = difflib.get_close_matches(name, same or known, n=1, cutoff=0.0 if same else 0.6)
    return found or [
        field
        for near in difflib.get_close_matches(last, [f.rpartition(".")[2] for f in known], n=1)
        for field in known
        if field.rpartition(".")[2] == near
    ]


def flag_message(message: str, values: flags.FlagValues) -> str:
    """Returns a message of absl about a flag, completed by a hint or the rule for the value."""
    if unknown := re.match(r"Unknown command line flag '([^']+)'", message):
        name = unknown[1]
        hint = did_you_mean("--", difflib.get_close_matches(name, list(values), n=1))
        if "config" in values and not hint:
            hint = did_you_mean("--config.", field_like(name))
        return f"--{name}: is not a flag of this command{hint}"
    if missing := re.match(r"flag --(\w+)=None: Flag --\w+ must have a value", message):
        return f"--{missing[1]}: must be given"
    if not_so := re.match(r"flag --config\.([^=]+)=(.*?): ", message, re.DOTALL):
        from hjepa_jax.config.fields import RULES

        field, value = not_so[1], not_so[2]
        value = value[:MAX_VALUE] + "..." * (len(value) > MAX_VALUE)  # leaves room for the rule
        kind = float if "[" in field else config_types().get(field)
        rule = RULES[kind] if kind else "is a group of fields, each of which is set by itself"
        return str(InputError(field, value, rule))
    return message


def override_message(argv: list[str], error: BaseException) -> str:
    """Returns the message for the first override of an unknown field or element; "" if none."""
    known = config_types()
    matches = (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv)
    overrides = [match[1] for match in matches if match]
    for field in overrides:
        if (name := field.partition("[")[0]) not in known:
            hint = did_you_mean("--config.", field_like(name))
            return f"--config.{field}: is not a field of a config{hint}"
    return next((f"--config.{field}: {error}" for field in overrides if "[" in field), "")


def config_types() -> dict[str, Any]:
    """Returns the type of each field of a config; loads JAX."""
    from hjepa_jax.config import base_config
    from hjepa_jax.config.fields import field_types

    return field_types(base_config())
