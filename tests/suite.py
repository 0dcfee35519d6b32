"""How the suite runs: the test files for every version of JAX, and the order of the tests."""

import os
import pathlib
import random

import pytest

# Test files that run on every supported version of JAX. Their tests get the mark `jax`.
ON_EVERY_JAX = {
    "metal/test_judge", "metal/test_programs", "test_agreement", "test_attentive", "test_augment",
    "test_checkpoint", "test_health", "test_hierarchy", "test_linear", "test_losses",
    "test_masking", "test_models", "test_optimizer", "test_options", "test_placement",
    "test_platform", "test_products", "test_selftest", "test_steps", "test_train",
}  # fmt: skip
# Test files about data files, reports, flags and processes. The version of JAX does not matter to
# them, or they use JAX only through code that the files above test.
ON_ONE_JAX = {
    "faults/test_damage", "faults/test_disk", "faults/test_fuzz", "faults/test_kills",
    "faults/test_resume", "test_alarms", "test_browser", "test_channels", "test_cli",
    "test_cluster", "test_command_line", "test_config", "test_convert", "test_demo", "test_docs",
    "test_embed", "test_error_fields", "test_examples", "test_export", "test_extras",
    "test_fewshot", "test_figures", "test_finetune", "test_fingerprint", "test_fitted_curve",
    "test_folder_files", "test_given", "test_held_out", "test_history", "test_host_memory",
    "test_intervals", "test_knn", "test_labelled", "test_layering", "test_layouts", "test_logging",
    "test_lowshot", "test_names", "test_npz_source", "test_other_jax", "test_package", "test_paths",
    "test_pipeline", "test_predict", "test_pretrained", "test_projector", "test_protocols",
    "test_published", "test_quality", "test_rectangles", "test_report", "test_results_table",
    "test_run_dir", "test_run_facts", "test_scaling", "test_seeds", "test_shapes", "test_snapshot",
    "test_sources", "test_stop_signals", "test_streaming", "test_suite", "test_sweep",
    "test_test_split", "test_tfds_source", "test_unlabelled", "test_user_cache", "test_warm_start",
    "test_whole_files",
}  # fmt: skip

TESTS = pathlib.Path(__file__).parent
# The longest files come first, so that two workers finish at about the same time.
# experiments/suite lists the CPU seconds of each file.
LONGEST = (
    "test_cluster", "test_examples", "test_layouts", "test_channels", "test_masking",
    "faults/test_resume", "faults/test_kills", "test_folder_files", "test_sweep", "test_package",
    "test_other_jax", "test_browser", "test_cli", "test_rectangles", "test_unlabelled",
    "test_warm_start", "faults/test_fuzz",  # files up to here have the longest slow tests
    "metal/test_programs", "test_train", "test_report", "test_options", "test_steps", "test_config",
    "test_models", "test_finetune", "test_agreement", "test_checkpoint", "test_augment",
    "test_streaming", "test_platform", "test_held_out", "test_embed", "test_snapshot",
    "test_protocols",
)  # fmt: skip
SEED = "HJEPA_TEST_ORDER"  # environment variable: seed of a random order of the tests


def name_of(path: pathlib.Path) -> str:
    """Returns the path of a test file relative to tests/, without its suffix."""
    return path.relative_to(TESTS).with_suffix("").as_posix()


def test_files() -> set[str]:
    """Returns the names of all test files in this checkout."""
    return {name_of(path) for path in TESTS.rglob("test_*.py")}


def mark(items: list[pytest.Item]) -> None:
    """Adds the mark `jax` to tests for every version of JAX, and `metal` to tests/metal."""
    for item in items:
        if (name := name_of(item.path)) in ON_EVERY_JAX:
            item.add_marker(pytest.mark.jax)
        if name.startswith("metal/"):
            item.add_marker(pytest.mark.metal)


def shuffle(items: list[pytest.Item], seed: str) -> None:
    """Puts the files into a random order, and also the tests within each file.

    The tests of a file stay together, so that its fixtures are created once.
    """
    order = random.Random(seed)
    by_file: dict[pathlib.Path, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    groups = list(by_file.values())
    order.shuffle(groups)
    for group in groups:
        order.shuffle(group)
    items[:] = [item for group in groups for item in group]


def longest_first(items: list[pytest.Item]) -> None:
    """Sorts the files by `LONGEST`; all other files follow in their old order."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(name_of(item.path), len(place)))


def arrange(items: list[pytest.Item]) -> None:
    """Marks all tests, then sorts them, or shuffles them if the variable `SEED` is set."""
    mark(items)
    if seed := os.environ.get(SEED):
        shuffle(items, seed)
    else:
        longest_first(items)
