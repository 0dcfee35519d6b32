"""Finds rows of results that can be reused, because everything that they depend on is unchanged."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax

from hjepa_jax.config import Config
from hjepa_jax.evaluation.feature_cache import params_digest
from hjepa_jax.evaluation.protocol import Protocol
from hjepa_jax.runs.scores import Row, rows_to_add_to
from hjepa_jax.runtime.backend import version
from hjepa_jax.runtime.provenance import source_digest

# Settings of a protocol that only some probes read, by the name of the probe.
OF_ONE_PROBE = {
    "lowshot_labels": "lowshot",
    "fewshot_shots": "fewshot",
    "finetune_epochs": "finetune",
}
OF_NO_PROBE = {"protocols", "levels", "pools"}  # they choose probes and features


class KnownRows:
    """The rows of a probe.json by the digest of everything that they depend on.

    Args:
      path: the probe.json.
      config: config of the run.
      settings: settings of all probes, and facts of the data.
      encoders: parameters by name.
    """

    def __init__(
        self, path: pathlib.Path, config: Config, settings: dict[str, Any], encoders: dict[str, Any]
    ):
        self._settings = {k: v for k, v in settings.items() if k not in OF_NO_PROBE}
        self._shared = [
            source_digest(),
            jax.default_backend(),
            *map(version, ("jaxlib", "numpy")),
            config.model.to_dict(),
            config.data.to_dict(),
        ]
        self._params = {name: params_digest(params) for name, params in encoders.items()}
        self._rows: dict[tuple[str, ...], list[Row]] = {}
        for row in rows_to_add_to(path):
            if row.get("made_from"):
                self._rows.setdefault(_key(row), []).append(row)

    def made_from(self, name: str, encoder: str, step: int) -> str:
        """Returns 16 hexadecimal digits for the probe `name` of an encoder."""
        settings = {k: v for k, v in self._settings.items() if OF_ONE_PROBE.get(k, name) == name}
        params = self._params.get(encoder)  # None for pixels
        # Verdicts compare with the untrained encoder.
        untrained = self._params.get("random_init") if name == "quality" else None
        parts = [*self._shared, settings, name, encoder, params, untrained, step]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def find(self, row: Row) -> list[Row]:
        """Returns the known rows with the protocol, features and `made_from` of `row`.

        Empty if some rows of that probe were replaced by rows with other settings.
        """
        rows = self._rows.get(_key(row), [])
        return rows if rows and len(rows) == rows[0].get("num_rows") else []

    def of(self, name: str, made_from: str) -> list[Row]:
        """Returns the known rows of a probe for any features."""
        found = (row for rows in self._rows.values() for row in rows)
        return [r for r in found if (r["protocol"], r["made_from"]) == (name, made_from)]


def _key(row: Row) -> tuple[str, ...]:
    names = ("protocol", "encoder", "pool", "level", "dim", "step", "made_from")
    return tuple(str(row.get(name)) for name in names)


def settings_of(protocol: Protocol, **more: Any) -> dict[str, Any]:
    """Returns the fields of a protocol and more settings in one dict."""
    return {**dataclasses.asdict(protocol), **more}
