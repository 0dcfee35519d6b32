"""Arrows between modules point one way."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "hjepa_jax"

# From the ground up: a module may import from lines above its own, and from its own line.
LAYERS = [
    ["errors", "names", "paths", "whole_files", "user_cache", "host_memory", "old_biases"],
    ["evaluation.intervals", "blocks", "models.products"],
    ["muon"],
    ["fields", "masking", "random_mask", "losses", "optimizer", "train_state",
     "data.sources", "data.shapes",
     "data.class_list", "data.folder_source", "data.folder_files", "data.npz_source",
     "data.test_split", "data.usage", "data.fingerprint", "data.given",
     "data.tfds_source", "data.tfds_records", "data.records",
     "data.streaming", "data.augment", "data.pipeline", "platform",
     "array_table", "provenance", "placement", "cluster"],
    ["models.hierarchy", "models.positions", "models.transformer",
     "models.pyramid", "models.vit", "models.predictor", "models.projection", "models.hjepa",
     "models.targets"],
    ["evaluation.quality", "evaluation.labelled", "evaluation.features", "evaluation.knn",
     "evaluation.linear", "evaluation.lowshot", "evaluation.fewshot"],
    ["evaluation.attentive", "evaluation.finetune"],
    ["evaluation.results"],
    ["evaluation.protocols"],
    ["config", "metrics", "logging", "history", "page", "figures", "snapshot",
     "projector", "objective"],
    ["collapse", "image_figures", "validation"],
    ["alarms", "seeds"],
    ["health"],
    ["steps"],
    ["build"],
    ["run_record"],
    ["same_run"],
    ["run_dir"],
    ["run"],
    ["checkpoint", "showcase"],
    ["judge", "run_facts", "warm_start"],
    ["verdicts"],
    ["curve_sections", "probe_sections"],
    ["run_report"],
    ["publish"],
    ["loop"],
    ["train"],
    ["api"],
    ["feature_file"],
    ["command_line", "cli", "main", "probe", "report", "embed", "selftest"],
]  # fmt: skip
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def imports(module: str) -> set[str]:
    """Modules of the package that `module` imports, wherever the statement stands."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hjepa_jax"):
            prefix = (node.module or "").removeprefix("hjepa_jax").removeprefix(".")
            names = {f"{prefix}.{a.name}".strip(".") for a in node.names}
            found |= {name for name in names if name in RANK} or {prefix}
    return found & set(RANK)


def external_imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    froms = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    return {name.split(".")[0] for name in names | froms}


def test_every_module_has_a_layer():
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    upward = {other for other in imports(module) if RANK[other] > RANK[module]}
    assert not upward


def test_only_checkpoint_imports_orbax():
    assert [m for m in MODULES if "orbax" in external_imports(m)] == ["checkpoint"]


def test_only_these_know_of_configs():
    reads_config = {m for m in MODULES if "config" in imports(m)}
    assert reads_config <= {
        "build", "run", "run_dir", "checkpoint", "judge", "loop", "train", "cli", "main", "probe",
        "api", "feature_file", "selftest", "run_facts", "run_report", "publish", "warm_start",
        "validation",
        "run_record", "same_run", "command_line", "seeds",
    }  # fmt: skip
