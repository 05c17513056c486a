"""Training data without the rows that a rollback has to skip."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from infini_ds.data.batches import Batch


class BatchStream(Protocol):
    """Training batches of this rank, without end, from a position that can be saved and restored."""

    @property
    def waited(self) -> float:
        """Seconds that the training loop has waited for batches so far."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch."""

    def at(self, state: dict[str, Any]) -> "BatchStream":
        """Return a new stream of the same rows whose first batch is that of `state`."""


@dataclass(frozen=True)
class SkipRows:
    """The batches of a stream, in which the rows of some numbers are blank.

    Every other row keeps its place in its batch, and every batch its place in the order, so the steps that hold no
    skipped row are the same as without this wrapper.
    """

    stream: BatchStream
    row_numbers: Collection[int]

    @property
    def waited(self) -> float:
        return self.stream.waited

    def __iter__(self) -> Iterator[Batch]:
        return (batch.blank(self.row_numbers) for batch in self.stream)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def at(self, state: dict[str, Any]) -> "SkipRows":
        return SkipRows(self.stream.at(state), self.row_numbers)
