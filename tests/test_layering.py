"""The folders of the package are floors: imports point down, and nowhere in a circle."""

import ast
import pathlib

import pytest

import hjepa_jax

PACKAGE = pathlib.Path(__file__).parent.parent / "hjepa_jax"

# From the ground up. A module may import from its own folder and from those before it.
FLOORS = [
    "errors", "runtime", "data", "masks", "models", "method", "config", "configs", "runs",
    "evaluation", "exchange", "reporting", "training", "commands",
]  # fmt: skip
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def floor(module: str) -> int:
    """The number of the floor of a module; modules outside the folders are the top floor."""
    name = module.partition(".")[0]
    return FLOORS.index(name if name in FLOORS else "commands")


def imports(module: str) -> set[str]:
    """Modules of the package that `module` imports, wherever the statement stands."""
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


def test_every_folder_is_a_floor():
    folders = {module.split(".")[0] for module in MODULES if "." in module}
    assert folders == set(FLOORS) - {"errors", "commands"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert not {other for other in imports(module) if floor(other) > floor(module)}


def test_no_circle():
    left = {module: imports(module) for module in MODULES}
    while removable := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in removable:
            del left[module]
    assert not left  # whatever is left imports itself through others


def test_only_the_two_checkpoint_modules_import_orbax():
    found = [module for module in MODULES if "orbax" in external_imports(module)]
    assert found == ["runs.checkpoint", "runs.newest_checkpoint"]


def test_nothing_below_the_config_knows_of_configs():
    below = {module for module in MODULES if floor(module) < FLOORS.index("config")}
    assert not {module for module in below if "ml_collections" in external_imports(module)}


@pytest.mark.parametrize(
    ("old", "name"),
    [("build", "build_embed_fn"), ("checkpoint", "load_encoder"), ("run_dir", "load_config")],
)
def test_old_import_paths_of_the_readme_work_with_a_warning(old, name):
    with pytest.warns(DeprecationWarning, match=f"hjepa_jax.{old} is now hjepa_jax."):
        assert callable(getattr(getattr(hjepa_jax, old), name))
