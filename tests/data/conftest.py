"""Prepared data in many small shards."""

import shutil
from pathlib import Path

import pytest

from data_prep.prepare import PrepareOptions, prepare


@pytest.fixture(scope="session")
def many(corpus, shards, tmp_path_factory) -> Path:
    """Some of the corpus in many small shards, with the tokenizer of `shards`."""
    folder = tmp_path_factory.mktemp("some")
    for file in sorted(corpus.glob("[a-h]*.txt")):
        shutil.copy(file, folder)
    out = tmp_path_factory.mktemp("many") / "many"
    options = {"tokenizer": str(shards / "tokenizer"), "sequence_length": 256, "workers": 1, "shard_bytes": 6_000}
    prepare(PrepareOptions(source=f"text:{folder}", out=out, validation_fraction=0.3, **options), quiet=True)
    return out


@pytest.fixture
def copy(many, tmp_path) -> Path:
    """A copy of `many`, without the shards that were expanded there, to damage."""
    return Path(shutil.copytree(many, tmp_path / "copy", ignore=shutil.ignore_patterns("*.mds")))
