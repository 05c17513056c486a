"""A row of the prepared data: what it holds, how documents are packed into it, how MDS stores it. Needs numpy alone.

Documents lie end to end in rows of `sequence_length` tokens; one that does not fit goes on in the next row. Each
document is its start token followed by its text. So the start token of the next document stands where the end token of
this one would: with plain shifted labels the last token of a text is taught to predict it, which is what teaches a
model to end, and no token is spent twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

LENGTHS_DTYPE = "uint32"


@dataclass(frozen=True)
class Row:
    """One row.

    input_ids: (sequence_length,) token ids.
    document_lengths: (pieces,) tokens of each document's piece in this row, in order, each at least 1. Where they sum
        to less than sequence_length the rest is padding; only the last row of a split has any. The first piece
        continues the previous row's last document unless its first token is the start token.
    learned: (sequence_length,) bool, the tokens that are to be predicted; None for all of them.
    """

    input_ids: np.ndarray
    document_lengths: np.ndarray
    learned: np.ndarray | None = None


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def mds_columns(sequence_length: int, vocab_size: int, has_answers: bool = False) -> dict[str, str]:
    """Columns of a row, in the words of `streaming.MDSWriter`. `has_answers`: not all tokens are to be predicted."""
    columns = {
        "input_ids": f"ndarray:{token_dtype(vocab_size)}:{sequence_length}",
        "document_lengths": f"ndarray:{LENGTHS_DTYPE}",
    }
    return columns | ({"learned": f"ndarray:uint8:{sequence_length}"} if has_answers else {})


def encode_row(row: Row) -> dict[str, np.ndarray]:
    """A row as a sample that MDSWriter takes."""
    sample = {"input_ids": row.input_ids, "document_lengths": row.document_lengths}
    return sample if row.learned is None else sample | {"learned": row.learned.astype(np.uint8)}


def decode_row(sample: dict[str, np.ndarray]) -> Row:
    """A sample as a row, with int64 arrays, since torch computes little on unsigned integers."""
    learned = sample["learned"].astype(bool) if "learned" in sample else None
    return Row(sample["input_ids"].astype(np.int64), sample["document_lengths"].astype(np.int64), learned)


class Packer:
    """Packs the pieces of one split, given in order, into rows of `sequence_length` tokens."""

    def __init__(self, sequence_length: int, vocab_size: int, pad_id: int, has_answers: bool = False):
        self.pad_id, self.has_answers = pad_id, has_answers
        self.length, self.dtype = sequence_length, token_dtype(vocab_size)
        self._open_row()

    def _open_row(self) -> None:
        self.tokens = np.full(self.length, self.pad_id, self.dtype)
        self.learned = np.zeros(self.length, bool) if self.has_answers else None
        self.lengths: list[int] = []
        self.used = 0

    def _close_row(self) -> Row:
        row = Row(self.tokens, np.array(self.lengths, LENGTHS_DTYPE), self.learned)
        self._open_row()
        return row

    def add(self, ids: np.ndarray, starts: bool, learned: np.ndarray | None = None) -> Iterator[Row]:
        """Yields the rows that `ids` fill; `starts`: a document begins here, and does not go on from before. `learned`:
        bool, which of them are to be predicted, where rows say so; None for all."""
        if learned is None:
            learned = np.ones(len(ids), bool)
        while len(ids):
            part = ids[: self.length - self.used]
            self.tokens[self.used : self.used + len(part)] = part
            if self.has_answers:
                self.learned[self.used : self.used + len(part)] = learned[: len(part)]
            if starts or not self.lengths:
                self.lengths.append(len(part))
            else:
                self.lengths[-1] += len(part)
            self.used += len(part)
            ids, learned, starts = ids[len(part) :], learned[len(part) :], False
            if self.used == self.length:
                yield self._close_row()

    def finish(self) -> Iterator[Row]:
        """Yields the last row, padded, if one is open."""
        if self.used:
            yield self._close_row()
