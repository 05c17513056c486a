"""Load the test classes for models that transformers ships in its source distribution, without copying them.

The source distribution of the installed version is downloaded once into a cache folder, with `parameterized`, which its
tests import. It lacks GenerationTesterMixin (tests/generation/test_utils.py) and tests/utils, which the modules for
models and configurations import; empty stand-ins take their place while these are loaded.
"""

import importlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import transformers

VERSION = transformers.__version__
PARAMETERIZED = "0.9.0"
PACKAGE = "transformers_own_tests"  # so that it does not collide with a package named `tests`


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "infini_ds" / f"transformers-tests-{VERSION}"


def fetch() -> Path:
    """Return the folder that holds `transformers_own_tests` and `parameterized`, downloaded if need be.

    Skips the calling module if no package index can be reached.
    """
    folder = cache_folder()
    if (folder / ".complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = ["download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder)]
    commands = [
        [*pip, *source, f"transformers=={VERSION}"],
        [*pip, "install", "--no-deps", "--target", str(folder), "--upgrade", f"parameterized=={PARAMETERIZED}"],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            pytest.skip(
                f"the package index gives no tests of transformers {VERSION}: {reason}", allow_module_level=True
            )
    (archive,) = folder.glob(f"transformers-{VERSION}.tar.gz")
    top = f"transformers-{VERSION}/tests/"
    with tarfile.open(archive) as file:
        for member in file.getmembers():
            if member.isfile() and member.name.startswith(top):
                target = folder / PACKAGE / member.name.removeprefix(top)
                target.parent.mkdir(parents=True, exist_ok=True)
                content = file.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())
    (folder / ".complete").touch()
    return folder


def _stand_in(name: str, **members: object) -> None:
    module = ModuleType(f"{PACKAGE}.{name}")
    module.__path__ = []  # type: ignore[attr-defined]  # a package
    vars(module).update(members)
    sys.modules[module.__name__] = module


def load() -> tuple[ModuleType, ModuleType]:
    """Return transformers' modules of tests for models and for configurations."""
    folder = fetch()
    sys.path.append(str(folder))
    (folder / PACKAGE / "__init__.py").touch()
    if not (folder / PACKAGE / "generation").exists():
        _stand_in("generation")
        _stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    if not (folder / PACKAGE / "utils").exists():
        _stand_in("utils")
        _stand_in("utils.test_configuration_utils", config_common_kwargs={})
    modeling = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    return modeling, importlib.import_module(f"{PACKAGE}.test_configuration_common")
