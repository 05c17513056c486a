"""What identifies training data: the rows that a run trains on, and their order."""

import json
from collections.abc import Sequence
from typing import Any

import xxhash

from infini_ds.data.sources import DataSource


def fingerprint(sources: Sequence[DataSource], global_rows: int, seed: int) -> dict[str, Any]:
    """Return all that determines which rows are trained on in which order, in a form that JSON can store.

    It depends neither on where the data lies nor on the number of ranks. Checkpoints and runs store it with these
    keys.

    Args:
        global_rows: rows of a step, over all ranks.
    """
    return {"batch.rows": global_rows, "data.seed": seed, "streams": [_of_source(source) for source in sources]}


def _of_source(source: DataSource) -> dict[str, Any]:
    rows = [[shard["samples"], shard["raw_data"]["hashes"]] for shard in source.shards("train")]
    digest = xxhash.xxh3_64_hexdigest(json.dumps(rows, sort_keys=True))
    return {"shards": digest, "proportion": source.proportion, "repeat": source.repeat}
