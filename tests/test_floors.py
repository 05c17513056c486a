"""The architecture: imports go down the rooms, each library is imported in one place, facts stay in their rooms."""

import ast
import re

import pytest
from harness import ROOT

# From the top down; docs/architecture.md says what each is for.
FLOORS = [
    "launch",
    "infini_ds/study",
    "infini_ds/benchmarks",
    "infini_ds/evaluation",
    "infini_ds/conversion",
    "infini_ds/training",
    "infini_ds/planning",
    "infini_ds/metrics",
    "infini_ds/checkpoint",
    "infini_ds/config",
    "infini_ds/distributed",
    "infini_ds/data",
    "data_prep",
    "infini_ds/streaming_compat",
    "infini_ds/utils",
    "infini_ds/model",
]
FILES = sorted(path for folder in ("launch", "infini_ds", "data_prep") for path in (ROOT / folder).rglob("*.py"))

# A library and the only places that import it.
DOORS = {
    "deepspeed": {"infini_ds/training/engine.py", "infini_ds/conversion/zero.py"},
    "streaming": {"infini_ds/streaming_compat/library.py"},
    "matplotlib": {"infini_ds/evaluation/plots.py"},
}


def imports(path) -> set[str]:
    """Modules that a file imports, absolute, as dotted names."""
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: 1 - node.level or None]) + "." if node.level else ""
            module = (base + (node.module or "")).strip(".")
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


def floor(name: str) -> int | None:
    """The floor of a path or dotted name, 0 at the top."""
    path = name.replace(".", "/") + "/"
    return next((i for i, top in enumerate(FLOORS) if path.startswith(top + "/")), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    own = floor(str(path.relative_to(ROOT).with_suffix("")))
    for name in imports(path):
        if floor(name) is not None:
            assert floor(name) >= own, f"{path.relative_to(ROOT)} imports {name}, which stands above it"


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_its_door(library):
    users = {str(p.relative_to(ROOT)) for p in FILES if any(name.split(".")[0] == library for name in imports(p))}
    assert users == DOORS[library]


def test_model_imports_torch_and_transformers_only():
    """And safetensors, which transformers needs: what an export carries has to run where nothing else is installed."""
    import sys

    allowed = {"torch", "transformers", "safetensors", "infini_ds"} | set(sys.stdlib_module_names)
    for path in (ROOT / "infini_ds" / "model").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path.name
        assert not any(
            name.startswith("infini_ds") and not name.startswith("infini_ds.model") for name in imports(path)
        )


def test_a_floor_above_would_be_seen():
    """The check itself: a name of a higher floor has a smaller number."""
    assert floor("infini_ds.training.trainer") < floor("data_prep.packing") < floor("infini_ds.model.memory")
    assert floor("launch/pretrain") == 0 and floor("torch.nn") is None


BELOW_LAUNCH = [p for p in FILES if floor(str(p.relative_to(ROOT)))]


@pytest.mark.parametrize("path", BELOW_LAUNCH, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_script_of_launch_is_named_below_it(path):
    scripts = "|".join(script.name for script in (ROOT / "launch").glob("*.py"))
    named = re.findall(rf"launch/(?:{scripts})", path.read_text())
    assert not named, f"{path.relative_to(ROOT)} names {named}: the rooms below launch/ do not know its scripts"


BELOW_CONFIG = [p for p in FILES if (floor(str(p.relative_to(ROOT))) or 0) > FLOORS.index("infini_ds/config")]


@pytest.mark.parametrize("path", BELOW_CONFIG, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_key_of_a_recipe_is_named_below_config(path):
    from infini_ds.config.keys import list_keys
    from infini_ds.config.recipe import Recipe

    keys = "|".join(re.escape(key.name) for key in list_keys(Recipe) if "." in key.name)
    named = re.findall(rf"(?<![\w.])(?:{keys})=", path.read_text())
    assert not named, f"{path.relative_to(ROOT)} names {named}: the caller adds the name of an option"
