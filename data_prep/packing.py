"""A row of prepared data: what it holds, how documents are packed into it, how MDS stores it. Needs numpy alone.

Documents follow each other in rows of `sequence_length` tokens; one that does not fit continues in the next row. Each
document is its start token followed by its text. So the start token of the next document is where the end token of this
one would be: with plain shifted labels, the last token of a text is trained to predict it. That teaches a model to end,
without a second special token a document.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

LENGTHS_DTYPE = "uint32"
LOSS_MASK = "loss_mask"  # column of rows in which not all tokens are predicted
LOSS_MASK_OF_EARLIER_VERSIONS = "learned"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        input_ids: (sequence_length,) token ids.
        document_lengths: (pieces,) tokens of each document's piece in this row, in order, each at least 1. If their sum
            is less than sequence_length, the rest is padding, which only the last row of a split has. The first piece
            continues the previous row's last document unless its first token is the start token.
        loss_mask: (sequence_length,) bool, the tokens that are predicted; None for all of them.
    """

    input_ids: np.ndarray
    document_lengths: np.ndarray
    loss_mask: np.ndarray | None = None


def token_dtype(vocab_size: int) -> str:
    """Return the smallest of uint16 and uint32 that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def mds_columns(sequence_length: int, vocab_size: int, has_loss_mask: bool = False) -> dict[str, str]:
    """Return the columns of a row and their types, as `streaming.MDSWriter` takes them."""
    columns = {
        "input_ids": f"ndarray:{token_dtype(vocab_size)}:{sequence_length}",
        "document_lengths": f"ndarray:{LENGTHS_DTYPE}",
    }
    return columns | ({LOSS_MASK: f"ndarray:uint8:{sequence_length}"} if has_loss_mask else {})


def encode_row(row: Row) -> dict[str, np.ndarray]:
    """Return a row as a sample for MDSWriter."""
    sample = {"input_ids": row.input_ids, "document_lengths": row.document_lengths}
    return sample if row.loss_mask is None else sample | {LOSS_MASK: row.loss_mask.astype(np.uint8)}


def decode_row(sample: Mapping[str, np.ndarray]) -> Row:
    """Return a sample as a row, with int64 arrays, since torch computes little on unsigned integers."""
    mask = sample.get(LOSS_MASK, sample.get(LOSS_MASK_OF_EARLIER_VERSIONS))
    return Row(
        input_ids=sample["input_ids"].astype(np.int64),
        document_lengths=sample["document_lengths"].astype(np.int64),
        loss_mask=None if mask is None else mask.astype(bool),
    )


class Packer:
    """Packs the pieces of one split, which come in order, into rows of `sequence_length` tokens."""

    def __init__(self, sequence_length: int, vocab_size: int, pad_id: int, has_loss_mask: bool = False):
        self.pad_id, self.has_loss_mask = pad_id, has_loss_mask
        self.length, self.dtype = sequence_length, token_dtype(vocab_size)
        self._open_row()

    def _open_row(self) -> None:
        self.tokens = np.full(self.length, self.pad_id, self.dtype)
        self.loss_mask = np.zeros(self.length, bool)
        self.lengths: list[int] = []
        self.used = 0

    def _close_row(self) -> Row:
        loss_mask = self.loss_mask if self.has_loss_mask else None
        row = Row(self.tokens, np.array(self.lengths, LENGTHS_DTYPE), loss_mask)
        self._open_row()
        return row

    def add(self, ids: np.ndarray, starts: bool, loss_mask: np.ndarray | None = None) -> Iterator[Row]:
        """Add a piece of a document, and yield the rows that it fills.

        Args:
            starts: a document begins with this piece; otherwise it continues the previous one.
            loss_mask: bool, which of `ids` are predicted; None for all of them. Kept if rows have a loss mask.
        """
        if loss_mask is None:
            loss_mask = np.ones(len(ids), bool)
        while len(ids):
            part = ids[: self.length - self.used]
            self.tokens[self.used : self.used + len(part)] = part
            self.loss_mask[self.used : self.used + len(part)] = loss_mask[: len(part)]
            if starts or not self.lengths:
                self.lengths.append(len(part))
            else:
                self.lengths[-1] += len(part)
            self.used += len(part)
            ids, loss_mask, starts = ids[len(part) :], loss_mask[len(part) :], False
            if self.used == self.length:
                yield self._close_row()

    def finish(self) -> Iterator[Row]:
        """Yield the last row, padded, if it has been begun."""
        if self.used:
            yield self._close_row()
