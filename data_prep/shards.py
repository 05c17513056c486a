"""One split on its way to disk: pieces are packed into rows, rows written as MDS shards, and everything counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.encode import Encoded
from data_prep.packing import Packer, encode_row, mds_columns


@dataclass
class SplitCounts:
    """tokens: start tokens included, padding not. bytes: of the documents' text in UTF-8."""

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    bytes: int = 0


class SplitWriter:
    """Takes a split's pieces in order. Made by `split_writer`."""

    def __init__(self, packer: Packer, mds):
        self.packer, self.mds = packer, mds
        self.counts = SplitCounts()

    def add(self, piece: Encoded) -> None:
        self.counts.documents += piece.starts
        self.counts.tokens += len(piece.ids)
        self.counts.bytes += piece.bytes
        self._write(self.packer.add(piece.ids, piece.starts, piece.learned))

    def finish(self) -> None:
        self._write(self.packer.finish())
        self.mds.finish()

    def _write(self, rows) -> None:
        for row in rows:
            self.counts.rows += 1
            self.mds.write(encode_row(row))


@contextmanager
def split_writer(
    folder: Path, sequence_length: int, vocab_size: int, pad_id: int, shard_bytes: int, has_answers: bool
) -> Iterator[SplitWriter]:
    """A writer to `folder`. The index, without which the shards are nothing, is written where the block ends well."""
    from infini_ds.streaming_compat.library import MDSWriter

    mds = MDSWriter(
        columns=mds_columns(sequence_length, vocab_size, has_answers),
        out=str(folder),
        compression="zstd",
        hashes=["xxh64"],
        size_limit=shard_bytes,
        max_workers=1,  # of upload threads, which have nothing to do here
    )
    writer = SplitWriter(Packer(sequence_length, vocab_size, pad_id, has_answers), mds)
    try:
        yield writer
        writer.finish()
    except BaseException:
        mds.cancel_future_jobs()
        raise
