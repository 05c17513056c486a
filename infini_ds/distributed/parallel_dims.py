"""How the ranks of a run are arranged: data parallel times sequence parallel.

Consecutive ranks form a sequence group: they read the same rows, and each holds a part of the segments. With
`sequence` = 2 and six ranks, (0, 1), (2, 3), (4, 5) are sequence groups, and (0, 2, 4), (1, 3, 5) are data groups.
"""

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist


@dataclass(frozen=True)
class ParallelDims:
    """This rank's place among the data ranks and among the ranks of its sequence group.

    Attributes:
        world_size: number of ranks.
        rank: this one's number.
        sequence: number of ranks across which the segments of a row are split.

    Raises:
        ValueError: `rank` is not one of `world_size` ranks, or `sequence` does not divide them.
    """

    world_size: int
    rank: int
    sequence: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} is not one of the ranks 0 to {self.world_size - 1}")
        if self.sequence < 1 or self.world_size % self.sequence:
            raise ValueError(f"sequence={self.sequence} does not divide the number of ranks, {self.world_size}")

    @property
    def data_size(self) -> int:
        """Number of data ranks: each reads rows that no other one reads."""
        return self.world_size // self.sequence

    @property
    def data_rank(self) -> int:
        """Which of the `data_size` shares of the rows this rank reads."""
        return self.rank // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Which of the `sequence` parts of a row this rank holds."""
        return self.rank % self.sequence

    @property
    def data_ranks(self) -> list[int]:
        """The ranks that hold the same part of other rows, in the order of their `data_rank`."""
        return list(range(self.sequence_rank, self.world_size, self.sequence))

    @property
    def sequence_ranks(self) -> list[int]:
        """The ranks that hold the parts of this rank's rows, in the order of their `sequence_rank`."""
        first = self.data_rank * self.sequence
        return list(range(first, first + self.sequence))

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """Process group of `data_ranks`. None if `sequence` is 1: all ranks, as None means in torch.distributed."""
        return self._groups[0] if self.sequence > 1 else None

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """Process group of `sequence_ranks`. None if `sequence` is 1: this rank alone, so it exchanges nothing."""
        return self._groups[1] if self.sequence > 1 else None

    @cached_property
    def _groups(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Create all groups at the first use, which is a collective call: every rank has to make it."""
        K, data = self.sequence, self.data_size
        data_group, _ = dist.new_subgroups_by_enumeration([[d * K + k for d in range(data)] for k in range(K)])
        sequence_group, _ = dist.new_subgroups_by_enumeration([[d * K + k for k in range(K)] for d in range(data)])
        return data_group, sequence_group
