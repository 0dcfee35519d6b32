"""Checks that runs differ only in their seed, so that their mean is meaningful."""

from collections.abc import Sequence
from typing import Any

from hjepa_jax.config.defaults import Config, differing_fields
from hjepa_jax.config.fields import get_field


def differences(
    configs: Sequence[Config], steps: Sequence[int] | None, images: Sequence[str | None] = ()
) -> str:
    """Returns why runs are not repetitions with different seeds; "" if they are.

    Args:
      configs: configs of the runs.
      steps: steps of their checkpoints; None if these may differ.
      images: fingerprints of their training images; None if unknown.
    """
    fields = {field for other in configs[1:] for field in differing_fields(configs[0], other)}
    fields.discard("seed")
    # `differing_fields` ignores eval.*, but this field decides the hyper-parameters of probes.
    if len({config.eval.num_val for config in configs}) > 1:
        fields.add("eval.num_val")
    shown = {field: [get_field(config, field) for config in configs] for field in sorted(fields)}
    if steps is not None and len(set(steps)) > 1:
        shown["step"] = [*steps]
    known = {data for data in images if data}
    if len(known) > 1 and configs[0].data.source != "shapes":  # its images depend on the seed
        shown["training images"] = [*images]
    if shown:
        told = "; ".join(f"{field} ({_listed(values)})" for field, values in shown.items())
        return f"the runs differ in {told}"
    seeds = [config.seed for config in configs]
    return f"runs have the same seed ({_listed(seeds)})" if len({*seeds}) < len(seeds) else ""


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(repr, values))
