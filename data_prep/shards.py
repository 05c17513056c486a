"""Writes one split: pieces are packed into rows, rows are written as MDS shards, and all of them are counted."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.encode import EncodedPiece
from data_prep.packing import Packer, Row, encode_row, mds_columns

if TYPE_CHECKING:
    from infini_ds.streaming_compat.library import MDSWriter


@dataclass
class SplitCounts:
    """What a split holds. tokens: with start tokens, without padding. bytes: of the documents' text in UTF-8."""

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    bytes: int = 0


class SplitWriter:
    """Writes the pieces of a split, which come in order. Created by `split_writer`."""

    def __init__(self, packer: Packer, mds: "MDSWriter"):
        self.packer, self.mds = packer, mds
        self.counts = SplitCounts()

    def add(self, piece: EncodedPiece) -> None:
        self.counts.documents += piece.starts
        self.counts.tokens += len(piece.ids)
        self.counts.bytes += piece.bytes
        self._write(self.packer.add(piece.ids, piece.starts, piece.loss_mask))

    def finish(self) -> None:
        self._write(self.packer.finish())
        self.mds.finish()

    def _write(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.counts.rows += 1
            self.mds.write(encode_row(row))


@contextmanager
def split_writer(
    folder: Path, sequence_length: int, vocab_size: int, pad_id: int, shard_bytes: int, has_loss_mask: bool
) -> Iterator[SplitWriter]:
    """Give the block a writer to `folder`. The index, without which shards are useless, is written if it succeeds."""
    from infini_ds.streaming_compat.library import MDSWriter

    mds = MDSWriter(
        columns=mds_columns(sequence_length, vocab_size, has_loss_mask),
        out=str(folder),
        compression="zstd",
        hashes=["xxh64"],
        size_limit=shard_bytes,
        max_workers=1,  # threads that upload, which have nothing to do here
    )
    writer = SplitWriter(Packer(sequence_length, vocab_size, pad_id, has_loss_mask), mds)
    try:
        yield writer
        writer.finish()
    except BaseException:
        mds.cancel_future_jobs()
        raise
