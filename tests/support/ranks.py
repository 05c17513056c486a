"""What tests start as processes of their own. Imports little, so that they start fast."""

import json
import os
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from infini_ds.config.training_data import find_sources
from infini_ds.data.streams import TrainingStream


def choose(*streams: dict) -> list[SimpleNamespace]:
    """Streams as a recipe gives them."""
    return [SimpleNamespace(**({"proportion": None, "repeat": None} | stream)) for stream in streams]


def read(stream: TrainingStream, count: int) -> list[list[tuple[int, int]]]:
    """The next batches: of each row its number and a sum that tells its content."""
    return [
        list(zip(batch.row_numbers, map(content, batch.input_ids), strict=True))
        for _, batch in zip(range(count), stream, strict=False)
    ]


def content(ids) -> int:
    return zlib.crc32(ids.numpy().tobytes())


def read_as_ranks(folder: str, streams: list[dict], rows: int, jobs: list[tuple]) -> None:
    """Do `jobs` (state, workers, count) as one of the ranks that the environment tells, and write what was seen."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    done = []
    for state, workers, count in jobs:
        sources, size = find_sources("", choose(*streams), ""), dist.get_world_size()
        stream = TrainingStream(sources, rows // size, 3, workers, data_rank=rank, data_size=size)
        if state:
            stream.load_state_dict(state)
        done.append((read(stream, count), stream.state_dict()))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(done))
    dist.destroy_process_group()


def hold_open(folder: str, kind: str) -> None:
    """Make a dataset, say so, and stay: `ours`, or `plain`, one of streaming's own."""
    if kind == "ours":
        kept = TrainingStream(find_sources(folder, [], ""), 2, 0, 0)
        number = kept.dataset._shm_prefix_int
    else:
        from infini_ds.streaming_compat.library import StreamingDataset

        kept = StreamingDataset(local=folder, split="train", batch_size=2)
        number = kept._shm_prefix_int
    print(number, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    if sys.argv[1] == "read":
        read_as_ranks(*json.loads(sys.stdin.read()))
    else:
        hold_open(*sys.argv[2:])
