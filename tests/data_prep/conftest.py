"""Real text: Python's help topics as files, and prepared."""

from pathlib import Path

import pytest
from preparing import SMALL, TEXTS

from data_prep.prepare import PrepareOptions, prepare


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """TEXTS as .txt files in two folders, named so that their order is that of TEXTS."""
    root = tmp_path_factory.mktemp("texts")
    for index, text in enumerate(TEXTS):
        path = root / f"{index // 40}" / f"{index:03}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    return root


@pytest.fixture(scope="session")
def prepared(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(PrepareOptions(source=f"text:{folder}", out=out, **SMALL), quiet=True)
    return out
