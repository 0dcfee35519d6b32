"""Decides on any machine whether Apple's plugins accept a program, from its lowered form.

    refusals(jax.jit(step).trace(state, images), "METAL")   # one line per refusal; [] = accepted

The accepted operations, types and forms come from the library of jax-metal 0.1.1 and from the
source of jax-mps 0.10.11. This module cannot detect wrong numbers, unsupported sort comparators,
memory use or speed. It does not check the kernels that jax-mps substitutes for some operations.

References:
  jax-ml/jax issues 16416 (complex), 16435 (float64), 20114 (batched products over two axes),
  20375 (callbacks), 21389 (population count, windowed sums), 16287 (QR).
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import stablehlo

COMMON_OPS = """
abs add all_reduce and atan2 bitcast_convert broadcast_in_dim case ceil clamp compare concatenate
constant convert convolution cosine custom_call divide dot dot_general dynamic_slice
dynamic_update_slice exponential exponential_minus_one floor gather if iota is_finite log
log_plus_one maximum minimum multiply negate not optimization_barrier or pad power reduce
reduce_window remainder reshape return reverse rng_bit_generator round_nearest_afz
round_nearest_even rsqrt scatter select select_and_scatter shift_left shift_right_arithmetic
shift_right_logical sign sine slice sort sqrt subtract tan tanh transpose while xor
"""
MPS_OPS = """
after_all cbrt cholesky complex composite count_leading_zeros create_token fft imag logistic
partition_id popcnt real reduce_precision triangular_solve
"""
DTYPES = {"i1", "i8", "i16", "i32", "i64", "ui8", "ui16", "ui32", "ui64", "f16", "bf16", "f32"}


@dataclasses.dataclass(frozen=True)
class Plugin:
    """The operations and types that a plugin accepts.

    Attributes:
      ops: StableHLO operations.
      dtypes: element types, in MLIR notation.
      argument_dtypes: element types that arguments and results of the program may have.
      custom_calls: prefixes of the names of custom calls.
    """

    ops: set[str]
    dtypes: set[str]
    argument_dtypes: set[str]
    custom_calls: tuple[str, ...]


PLUGINS = {
    "METAL": Plugin(
        ops=set(COMMON_OPS.split()),
        dtypes=DTYPES,  # ui64 appears inside threefry
        argument_dtypes=DTYPES - {"ui64"},
        custom_calls=("mhlo.", "Sharding"),
    ),
    "mps": Plugin(
        ops=set((COMMON_OPS + MPS_OPS).split()),
        dtypes=DTYPES | {"complex<f32>"},
        argument_dtypes=DTYPES | {"complex<f32>"},
        custom_calls=("mhlo.", "mps.", "Sharding", "SPMD"),
    ),
}


def refusals(traced: Any, platform: str) -> list[str]:
    """Returns the reasons why the plugin would refuse the program; [] = it accepts the program.

    Args:
      traced: a `jax.stages.Traced`, or anything whose `lower(lowering_platforms=...)` gives a
        `jax.stages.Lowered`.
      platform: the name under which the plugin registers, "METAL" or "mps".
    """
    try:
        lowered = traced.lower(lowering_platforms=(platform,))
    except NotImplementedError as error:  # JAX itself has no lowering rule, as for callbacks
        return [f"does not lower: {str(error).splitlines()[0]}"]
    module, plugin, found = lowered.compiler_ir("stablehlo"), PLUGINS[platform], []
    try:
        _as_the_plugin_gets_it(module, platform)
    except Exception as error:  # MLIR has no common base class for its errors
        return [f"does not convert to the plugin's StableHLO: {str(error).splitlines()[0]}"]

    def judge(op: Any) -> ir.WalkResult:
        found.extend(_refused(op.operation, plugin, platform))
        return ir.WalkResult.ADVANCE

    module.operation.walk(judge)
    return sorted(set(found))


def _as_the_plugin_gets_it(module: ir.Module, platform: str) -> None:
    """Converts the module in the same way as jaxlib does before it calls the plugin.

    CHLO operations are decomposed. (jaxlib keeps erf, top_k and tan as custom calls, which both
    plugins accept.) jax-metal knows StableHLO only up to 1.0.0. That version has no batching
    dimensions in gathers.
    """
    stablehlo.register_stablehlo_passes()
    _run_pass(module, "chlo-legalize-to-stablehlo")
    if platform == "METAL":
        _run_pass(module, "stablehlo-compatibility-expander{target=1.0.0}")
        copy = ir.Module.parse(str(module), module.context)  # serializing changes its module
        stablehlo.serialize_portable_artifact(copy, "1.0.0")


def _run_pass(module: ir.Module, name: str) -> None:
    """Runs a pass on functions or on the module: this depends on the version of jaxlib."""
    pipelines = (f"builtin.module(func.func({name}))", f"builtin.module({name})")
    with module.context:
        for pipeline in pipelines:
            try:
                manager = passmanager.PassManager.parse(pipeline)
            except Exception as error:  # ValueError or MLIRError, depending on the version
                failure = error
                continue
            manager.run(module.operation)
            return
    raise failure


def _refused(op: Any, plugin: Plugin, platform: str) -> list[str]:
    """Returns the reasons why the plugin would refuse one operation."""
    if op.name == "func.func":
        block = op.regions[0].blocks[0]
        values = [*block.arguments, *block.operations[len(block.operations) - 1].operands]
        public = "public" in str(op.attributes["sym_visibility"])
        types = _dtypes(values) if public else set()
        return [f"argument or result of {t}" for t in types - plugin.argument_dtypes]
    found = [f"{op.name} of {t}" for t in _dtypes(op.results) - plugin.dtypes]
    dialect, _, name = op.name.partition(".")
    if dialect == "stablehlo":
        if name not in plugin.ops:
            found.append(op.name)
        forms = {**_FORMS, **(_METAL_FORMS if platform == "METAL" else {})}
        if name in forms:
            found += [f"{op.name}: {reason}" for reason in forms[name](op)]
        if name == "custom_call":
            target = str(op.attributes["call_target_name"]).strip('"')
            if not target.startswith(plugin.custom_calls):
                found.append(f"{op.name} of {target}")
    elif op.name not in ("builtin.module", "func.return", "func.call"):
        found.append(op.name)
    return found


def _dtypes(values: Any) -> set[str]:
    """Returns the element types of all tensors in `values`."""
    types = (re.fullmatch(r"tensor<(?:[0-9?]+x)*(.+)>", str(value.type)) for value in values)
    return {match[1] for match in types if match}


def _body(op: Any) -> list[str]:
    """Returns the names of the operations in the body of a reduction or scatter."""
    return [inner.operation.name for inner in op.regions[0].blocks[0].operations]


def _numbers(op: Any, name: str) -> list[int]:
    """Returns an attribute that is a list of numbers; [] if it is missing."""
    return [int(n) for n in op.attributes[name]] if name in op.attributes else []


def _is_integer(value: Any) -> bool:
    return all(dtype.lstrip("u").startswith("i") for dtype in _dtypes([value]))


def _scatter(op: Any) -> list[str]:
    return ["of several arrays at once"] if len(op.operands) > 3 else []


def _metal_scatter(op: Any) -> list[str]:
    body = [name.removeprefix("stablehlo.") for name in _body(op)]
    plain = body == ["return"] or (
        len(body) == 2 and body[0] in ("add", "maximum", "minimum", "multiply")
    )
    return _scatter(op) + ([] if plain else [f"combines by {body}"])


def _metal_dot_general(op: Any) -> list[str]:
    numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
    batched = len(list(numbers.lhs_batching_dimensions)) > 0
    found = ["of integers"] if _is_integer(op.results[0]) else []
    if batched and len(list(numbers.lhs_contracting_dimensions)) > 1:
        found.append("batched, with more than one contracting dimension")
    return found


def _metal_gather(op: Any) -> list[str]:
    numbers = stablehlo.GatherDimensionNumbers(op.attributes["dimension_numbers"])
    rank = ir.RankedTensorType(op.operands[1].type).rank
    return [] if numbers.index_vector_dim == rank - 1 else ["index vectors not in the last axis"]


def _metal_reduce_window(op: Any) -> list[str]:
    found = [] if _body(op)[0] == "stablehlo.maximum" else [f"by {_body(op)[0]}"]
    dilated = (n > 1 for a in ("base_dilations", "window_dilations") for n in _numbers(op, a))
    return found + (["dilated"] if any(dilated) else [])


def _metal_convolution(op: Any) -> list[str]:
    found = ["of integers"] if _is_integer(op.results[0]) else []
    if any(_numbers(op, "window_reversal")):
        found.append("reversed window")
    if int(op.attributes["batch_group_count"]) > 1:
        found.append("batch groups")
    transposed = any(n > 1 for n in _numbers(op, "lhs_dilation"))
    if transposed and int(op.attributes["feature_group_count"]) > 1:
        found.append("transposed, with groups")
    return found


Form = Callable[[Any], list[str]]
_FORMS: dict[str, Form] = {"scatter": _scatter}
_METAL_FORMS: dict[str, Form] = {
    "scatter": _metal_scatter,
    "dot_general": _metal_dot_general,
    "gather": _metal_gather,
    "reduce_window": _metal_reduce_window,
    "convolution": _metal_convolution,
}
