"""Reading prepared data: in this process, or as one of several ranks, `python tests/support/ranks.py`.

Imports little, so that ranks start fast.
"""

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from infini_ds.data.sources import DataSource, StreamSpec, open_sources
from infini_ds.data.streams import TrainingStream

SEED = 3


class Job(NamedTuple):
    """Batches to read: `count` of them from a position, with data workers, `sequence` ranks reading the same rows."""

    state: dict[str, Any] | None
    workers: int
    count: int
    sequence: int = 1


def sources_of(*streams: dict[str, Any] | str | Path, cache: str | Path = "") -> list[DataSource]:
    """Open streams that are given by their path, or as a recipe gives them: {"path": ..., "proportion": 3}."""
    specs = [
        StreamSpec(f"stream[{i}]", **stream) if isinstance(stream, dict) else StreamSpec("path", str(stream))
        for i, stream in enumerate(streams)
    ]
    return open_sources(specs, str(cache), "cache")


def read(stream: TrainingStream, count: int) -> list[list[tuple[int, int]]]:
    """Return the next batches: of each row its number and a checksum of its content."""
    return [
        list(zip(batch.row_numbers, map(_checksum, batch.input_ids), strict=True))
        for _, batch in zip(range(count), stream, strict=False)
    ]


def _checksum(ids: Tensor) -> int:
    return zlib.crc32(ids.numpy().tobytes())


def read_as_rank(folder: str, streams: list[dict[str, Any]], rows: int, jobs: list[list[Any]]) -> None:
    """Do `jobs` as one of the ranks of the environment, and write to `folder` what was read.

    Args:
        rows: of a global batch.
    """
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    done = []
    for job in (Job(*job) for job in jobs):
        size = dist.get_world_size() // job.sequence
        stream = TrainingStream(
            sources_of(*streams), rows // size, SEED, job.workers, data_rank=rank // job.sequence, data_size=size
        )
        if job.state:
            stream.load_state_dict(job.state)
        done.append((read(stream, job.count), stream.state_dict()))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(done))
    dist.destroy_process_group()


if __name__ == "__main__":
    read_as_rank(*json.loads(sys.stdin.read()))
