"""What lies where: cuts of parameters by hand, and their bytes on eight devices."""

import json
import pathlib

import jax
import numpy as np
import pytest

from hjepa_jax import build, placement, platform, run
from hjepa_jax.config import base_config
from hjepa_jax.data.sources import Source, SourceInfo
from hjepa_jax.errors import InputError
from tests import processes


@pytest.mark.parametrize(
    ("shape", "fsdp", "axis"),
    [
        ((384, 1536), 8, 1),  # the largest dimension
        ((384, 384), 8, 0),  # the first, of equals
        ((1000, 1024), 16, 1),
        ((1030, 1000), 8, 1),  # the largest that 8 divides
        ((1030, 1001), 8, None),  # it divides none
        ((1023,), 1, None),
        ((1016,), 8, None),  # too small
        ((), 8, None),
    ],
)
def test_an_array_is_cut_along_its_largest_divisible_dimension(shape, fsdp, axis):
    assert placement.sharded_axis(shape, fsdp) == axis


def test_a_single_device_needs_no_layout(tiny_config):
    place = placement.make_placement(jax.devices()[:1], fsdp=1)
    assert (place.whole, place.rows, place.batches, place.state({"x": 1})) == (None,) * 4
    np.testing.assert_array_equal(place.local(place.put({"x": np.ones(3)}, None))["x"], np.ones(3))


def test_fsdp_that_does_not_divide_the_devices_is_refused(tiny_config):
    tiny_config.parallel.fsdp = 3
    rule = r"parallel\.fsdp=3: must divide the number of devices, 1"
    with pytest.raises(InputError, match=rule):
        run.build_run(tiny_config, run.open_config_source(tiny_config))


def measure_bytes(path: pathlib.Path) -> None:
    """ViT-Small at 224 pixels on 8 devices: bytes of each, and of everything, to a file."""
    platform.select_platform("cpu", cpu_devices=8)
    c = base_config()
    c.model.name, c.data.image_size, c.model.patch_size = "vit_small", 224, 16
    c.parallel.fsdp = 8
    source = Source("none", SourceInfo(512, 512, (224, 224, 3), ("a",)), load=tuple)
    built = run.build_run(c, source)
    tx = build.build_optimizer(c, built.schedules)
    shapes = jax.eval_shape(build.build_create_state(c, built.model, tx))
    layout = built.placement.state(shapes)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = built.placement.put(zeros, layout)
    leaves = jax.tree.leaves((state.params, state.target_params, state.opt_state))
    shards = [shard for leaf in leaves for shard in leaf.addressable_shards]
    held = {d.id: sum(s.data.nbytes for s in shards if s.device == d) for d in jax.devices()}
    path.write_text(json.dumps({"held": held, "whole": sum(leaf.nbytes for leaf in leaves)}))


def test_eight_devices_hold_at_most_a_fifth_of_vit_small_each(tmp_path, record_property):
    process = processes.CONTEXT.Process(target=measure_bytes, args=(tmp_path / "bytes.json",))
    process.start()
    process.join()
    measured = json.loads((tmp_path / "bytes.json").read_text())
    assert len(measured["held"]) == 8
    assert measured["whole"] > 300e6  # parameters, EMA and two moments of 22 million
    assert max(measured["held"].values()) <= 0.2 * measured["whole"]
    record_property("fraction", max(measured["held"].values()) / measured["whole"])
