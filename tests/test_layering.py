"""The folders of the package are layers: imports point to lower layers, without cycles."""

import ast
import pathlib

import pytest

import hjepa_jax

PACKAGE = pathlib.Path(__file__).parent.parent / "hjepa_jax"

# Layers from low to high. A module may import from its own folder and from lower ones.
LAYERS = [
    "errors", "runtime", "data", "masks", "models", "method", "config", "configs", "runs",
    "evaluation", "exchange", "reporting", "training", "commands",
]  # fmt: skip
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def layer_of(module: str) -> int:
    """Returns the layer number of a module; modules outside the folders are the top layer."""
    name = module.partition(".")[0]
    return LAYERS.index(name if name in LAYERS else "commands")


def imports(module: str) -> set[str]:
    """Returns the modules of the package that `module` imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hjepa_jax"):
            parent = (node.module or "").removeprefix("hjepa_jax").removeprefix(".")
            names = [f"{parent}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name if name in MODULES else parent for name in names}
    return found & set(MODULES)


def external_imports(module: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(MODULES[module].read_text())))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    froms = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    return {name.split(".")[0] for name in names | froms}


def test_every_folder_is_a_layer():
    folders = {module.split(".")[0] for module in MODULES if "." in module}
    assert folders == set(LAYERS) - {"errors", "commands"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_the_same_or_a_lower_layer(module):
    assert not {other for other in imports(module) if layer_of(other) > layer_of(module)}


def test_imports_have_no_cycle():
    left = {module: imports(module) for module in MODULES}
    while removable := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in removable:
            del left[module]
    assert not left  # any module left is part of a cycle or imports one


def test_only_the_two_checkpoint_modules_import_orbax():
    found = [module for module in MODULES if "orbax" in external_imports(module)]
    assert found == ["runs.checkpoint", "runs.newest_checkpoint"]


def test_modules_below_config_do_not_import_ml_collections():
    below = {module for module in MODULES if layer_of(module) < LAYERS.index("config")}
    assert not {module for module in below if "ml_collections" in external_imports(module)}


@pytest.mark.parametrize(
    ("old", "name"),
    [("build", "build_embed_fn"), ("checkpoint", "load_encoder"), ("run_dir", "load_config")],
)
def test_old_import_paths_of_the_readme_work_with_a_warning(old, name):
    with pytest.warns(DeprecationWarning, match=f"hjepa_jax.{old} is now hjepa_jax."):
        assert callable(getattr(getattr(hjepa_jax, old), name))
