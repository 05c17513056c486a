"""A small folder of shards, written by streaming alone."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from infini_ds.streaming_compat.library import MDSWriter

ROWS = 300


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    """ROWS rows in 34 compressed shards; row i holds 64 times the number i."""
    folder = tmp_path_factory.mktemp("shards") / "data"
    columns = {"input_ids": "ndarray:uint16:64"}
    with MDSWriter(
        columns=columns, out=str(folder / "train"), compression="zstd", hashes=["xxh64"], size_limit=1500
    ) as writer:
        for number in range(ROWS):
            writer.write({"input_ids": np.full(64, number, np.uint16)})
    assert len(list(folder.glob("train/*.zstd"))) == 34
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy of `written`, without the shards that were expanded there, to damage."""
    return Path(shutil.copytree(written, tmp_path / "data", ignore=shutil.ignore_patterns("*.mds")))


@pytest.fixture
def large(tmp_path) -> Path:
    """One shard of 2 MiB, which takes some milliseconds to write."""
    folder = tmp_path / "large"
    with MDSWriter(
        columns={"x": "bytes"}, out=str(folder / "train"), compression="zstd", hashes=["xxh64"], size_limit=1 << 22
    ) as writer:
        writer.write({"x": os.urandom(1 << 21)})
    return folder
