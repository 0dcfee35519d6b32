"""Device layouts: cases by hand of sharded axes, and measured bytes on eight devices."""

import math
import re
import types

import jax
import numpy as np
import pytest

from hjepa_jax.config import base_config, build
from hjepa_jax.data.base import Source, SourceInfo
from hjepa_jax.data.folder import FolderRecords
from hjepa_jax.data.image_file import RGB
from hjepa_jax.errors import InputError
from hjepa_jax.runs import array_table, run
from hjepa_jax.runtime import backend, placement
from tests import processes


@pytest.mark.parametrize(
    ("shape", "fsdp", "axis"),
    [
        ((384, 1536), 8, 1),  # the largest dimension
        ((384, 384), 8, 0),  # the first of equal ones
        ((1000, 1024), 16, 1),
        ((1030, 1000), 8, 1),  # the largest that 8 divides
        ((1030, 1001), 8, None),  # 8 divides no dimension
        ((1023,), 1, None),
        ((1016,), 8, None),  # too small
        ((), 8, None),
    ],
)
def test_an_array_is_sharded_along_its_largest_divisible_axis(shape, fsdp, axis):
    assert placement.sharded_axis(shape, fsdp) == axis


def test_a_single_device_needs_no_layout(tiny_config):
    place = placement.make_placement(jax.devices()[:1], fsdp=1)
    assert (place.whole, place.rows, place.batches, place.state({"x": 1})) == (None,) * 4
    np.testing.assert_array_equal(place.local(place.put({"x": np.ones(3)}, None))["x"], np.ones(3))


@pytest.mark.parametrize(
    ("field", "rule"),
    [
        ("parallel.fsdp", "must divide the number of devices, 1"),
        ("optim.accumulation_steps", "must be a multiple of the number of devices, 1, times"),
    ],
)
def test_devices_that_do_not_divide_are_refused(tiny_config, field, rule):
    tiny_config.update_from_flattened_dict({field: 3})
    with pytest.raises(InputError, match=rule):
        run.build_run(tiny_config, run.open_config_source(tiny_config))


def test_images_too_large_for_a_device_are_refused_with_numbers(tiny_config, monkeypatch):
    source = run.open_config_source(tiny_config)
    num_bytes = source.info.num_train * math.prod(source.info.image_shape)
    monkeypatch.setattr(placement, "machine_bytes", lambda: num_bytes - 1)
    rule = r"data\.source=.*needs 0\.00 GiB for the training images on each cpu device"
    with pytest.raises(InputError, match=rule):
        run.build_run(tiny_config, source)
    placement.check_resident("npz:x", num_bytes - 1)
    gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 2**30})
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    placement.check_resident("tfds:x", 2**30)
    with pytest.raises(InputError, match=r"needs 1\.50 GiB .* each gpu device, which has 1\.00"):
        placement.check_resident("tfds:x", 3 * 2**29)
    gpu.memory_stats = lambda: None  # Apple's plugins report no memory
    placement.check_resident("tfds:x", 2**40)


def measure() -> dict:
    backend.select_platform("cpu", cpu_devices=8)
    return {**measure_bytes(), "checksums": measure_checksums()}


@pytest.fixture(scope="module")
def on_eight_devices() -> dict:
    return processes.call(measure)


def measure_bytes() -> dict:
    """Returns the bytes of ViT-Small at 224 pixels on each device, and in total."""
    c = base_config()
    c.model.name, c.data.image_size, c.model.patch_size = "vit_small", 224, 16
    tx = build.build_optimizer(c, build.build_schedules(c, 512))
    shapes = jax.eval_shape(build.build_create_state(c, build.build_model(c), tx))
    place = placement.make_placement(jax.devices(), fsdp=8)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = place.put(zeros, place.state(shapes))
    leaves = jax.tree.leaves((state.params, state.target_params, state.opt_state))
    shards = [shard for leaf in leaves for shard in leaf.addressable_shards]
    held = {d.id: sum(s.data.nbytes for s in shards if s.device == d) for d in jax.devices()}
    return {"held": held, "whole": sum(leaf.nbytes for leaf in leaves)}


def measure_checksums() -> dict:
    """Returns checksums of one array in several layouts, and the collectives of one program."""
    x = np.random.default_rng(0).normal(size=(512, 4, 64)).astype(np.float32)
    places = {n: placement.make_placement(jax.devices(), fsdp=n) for n in (1, 2, 8)}
    arrays = [x, jax.device_put(x), *(p.put(x, p.state(x)) for p in places.values())]
    arrays.append(places[2].put(x, places[2].rows))  # sharded over both axes
    cut = arrays[-2]
    program = array_table.block_sums_fn(cut.sharding, cut.sharding.shard_shape(x.shape))
    text = program.lower(cut).compile().as_text()
    return {"values": array_table.word_checksums(arrays), "sent": COLLECTIVE.findall(text)}


COLLECTIVE = re.compile(r"= (.*) (?:all-|collective-|reduce-scatter)[a-z-]*\(")


def collectives() -> list[list[str]]:
    """Returns the array types that devices exchange in two programs: "u8[4,8,32,32,3]{...}"."""
    backend.select_platform("cpu", cpu_devices=8)
    c = base_config()
    c.data.image_size, c.model.patch_size = 32, 8
    c.model.width, c.model.depth, c.model.num_heads = 16, 1, 2
    c.model.predictor_width, c.model.predictor_depth, c.model.predictor_num_heads = 8, 1, 2
    c.train.batch_size, c.optim.accumulation_steps = 32, 4
    found = []
    for records in (None, FolderRecords(["a"] * 64, 32, RGB, 3)):  # resident, and streamed
        source = Source(
            "none", SourceInfo(64, 64, (32, 32, 3), ("a",)), load=tuple, records=records
        )
        program = run.build_run(c, source).lower(steps_per_call=2, donate=False).compile()
        found.append(COLLECTIVE.findall(program.as_text()))
    return found


@pytest.mark.slow
def test_eight_devices_hold_at_most_a_fifth_of_vit_small_each(on_eight_devices, record_property):
    measured = on_eight_devices
    assert len(measured["held"]) == 8
    assert measured["whole"] > 300e6  # 22 million parameters, with their EMA and two moments
    assert max(measured["held"].values()) <= 0.2 * measured["whole"]
    record_property("fraction", max(measured["held"].values()) / measured["whole"])


@pytest.mark.slow
def test_accumulation_sends_no_image_between_devices():
    for sent in processes.call(collectives):
        assert any("f32[" in types for types in sent)  # gradients are summed
        assert not [types for types in sent if "u8[" in types or ",32,32,3]" in types]


@pytest.mark.slow
def test_checksums_do_not_depend_on_sharding_and_need_no_collective(on_eight_devices):
    values, sent = on_eight_devices["checksums"].values()
    assert len(values) == 6
    assert len(set(values)) == 1
    assert sent == []
