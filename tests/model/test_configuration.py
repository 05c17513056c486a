"""The files that an export carries."""

from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import infini_ds.model

FOLDER = Path(infini_ds.model.__file__).parent


def direct_imports(name: str) -> set[str]:
    return {f"{module}.py" for module in get_relative_imports(FOLDER / name)}


@pytest.mark.parametrize("name", ["configuration.py", "modeling.py"])
def test_transformers_copies_every_file_that_an_export_needs(name):
    """Loading an exported folder, transformers 4 copies the files that configuration.py, and then modeling.py, imports
    directly, not what these import in turn.
    """
    needed = {Path(file).name for file in get_relative_import_files(str(FOLDER / name))}
    copied = direct_imports("configuration.py") | {"configuration.py"}
    if name == "modeling.py":
        copied |= direct_imports("modeling.py")
    assert needed <= copied
