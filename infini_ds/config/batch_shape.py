"""How the rows of a step are divided over data ranks, gradient accumulation and micro-batches."""

import math
from dataclasses import dataclass

from infini_ds.config.recipe import BatchSection
from infini_ds.utils.errors import UserError


@dataclass(frozen=True)
class BatchShape:
    """The division of a global batch: `data_size` × `accumulation` × `micro_rows` = `rows`.

    Attributes:
        rows: rows of an optimizer step over all data ranks.
        data_size: number of data ranks.
        micro_rows: rows of a micro-batch of one data rank.
    """

    rows: int
    data_size: int
    micro_rows: int

    @property
    def rank_rows(self) -> int:
        """Rows of an optimizer step that one data rank reads."""
        return self.rows // self.data_size

    @property
    def accumulation(self) -> int:
        """Micro-batches whose gradients are accumulated for an optimizer step."""
        return self.rank_rows // self.micro_rows


def batch_shape(batch: BatchSection, sequence_length: int, data_size: int, sequence: int = 1) -> BatchShape:
    """Divide the global batch over data ranks and micro-batches.

    `batch.micro_rows` is an upper bound: it is lowered to the largest number that divides the rows of a rank.
    `sequence`: ranks that share each row.

    Raises:
        UserError: the batch is less than one row, or its rows cannot be divided over the data ranks.
    """
    if batch.rows is not None:
        rows, given = batch.rows, f"batch.rows={batch.rows}"
    else:
        assert batch.tokens is not None  # the recipe's check leaves exactly one of the two
        rows, given = batch.tokens // sequence_length, f"batch.tokens={batch.tokens}"
        if rows < 1:
            raise UserError(f"{given} is less than one row of {sequence_length} tokens: give more tokens")
        given += f" ({rows} rows of {sequence_length} tokens)"
    if rows % data_size:
        nearest = max(1, round(rows / data_size)) * data_size
        ranks = "ranks" if sequence == 1 else f"groups of parallel.sequence={sequence} ranks"
        shared = sequence * data_size // math.gcd(rows, data_size)
        raise UserError(
            f"{given} cannot be divided over {data_size} {ranks}: divide each row over ranks with parallel.sequence="
            f"{shared}, or give batch.tokens=null batch.rows={nearest}"
        )
    rank_rows = rows // data_size
    micro_rows = max(m for m in range(1, min(batch.micro_rows, rank_rows) + 1) if rank_rows % m == 0)
    return BatchShape(rows, data_size, micro_rows)
