"""Whether a limit on the cache of remote shards is safe."""

from collections.abc import Sequence

from infini_ds.data.remote import LOCAL_SCHEME
from infini_ds.data.sources import DataSource
from infini_ds.utils.errors import UserError

PREFETCH_BATCHES = 3  # batches a reader that are asked for at a time where the cache is limited: the next, and two more
FEWEST_SHARDS = 4  # that streaming's limit has to hold


def check_cache_limit(
    sources: Sequence[DataSource], limit: int, rows_ahead: int, option: str, cache_option: str
) -> None:
    """Raise a UserError if streaming would delete the only copy of a shard, or what it has just fetched.

    It deletes shards of local folders too: https://github.com/mosaicml/streaming/issues/988

    Args:
        limit: bytes.
        rows_ahead: rows that this node asks for at a time.
        option, cache_option: names of the limit and of the cache's folder, for the error.
    """
    for source in sources:
        if source.remote is None:
            raise UserError(
                f"{option}={limit} would delete shards of {source.option}={source.folder}, the only copy: name it "
                f"{LOCAL_SCHEME}{source.folder.resolve()}, which is then read through {cache_option}, or leave out "
                f"{option}"
            )
    shards = [shard for source in sources for shard in source.shards("train")]
    largest = max(shard["raw_data"]["bytes"] + (shard["zip_data"] or {"bytes": 0})["bytes"] for shard in shards)
    indexes = sum((source.folder / "train" / "index.json").stat().st_size for source in sources)
    at_a_time = max(FEWEST_SHARDS, min(len(shards), rows_ahead))
    least = at_a_time * largest + indexes
    if limit < least:
        raise UserError(
            f"{option}={limit} is too little for the {at_a_time} shards of up to {largest} bytes that this node reads "
            f"at a time: give {least} or, better, enough for as many shards as the disk holds"
        )
