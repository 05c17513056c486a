"""The order in which a forward pass computes a sequence: in blocks of segments, one block after the other."""

from dataclasses import dataclass

MAX_BLOCK_TOKENS = 16_384  # of a row; bounds the activations of a long prompt


@dataclass(frozen=True)
class BlockSchedule:
    """How a model runs over the segments of a row. It is not a part of the model's configuration, since it never
    changes logits or losses beyond rounding: set `model.block_schedule`.

    Attributes:
        segments_per_block: segments that are computed at once. With gradient checkpointing, activations are kept for
            one block only. None: all segments in training, otherwise as many as MAX_BLOCK_TOKENS tokens hold.
        checkpoint_layers: recompute each layer in the backward pass, so that only one layer of a block keeps its
            activations at a time. Together with gradient checkpointing, each layer runs forward three times.
        offload_states: with gradient checkpointing, keep the memory before each block on the CPU until the backward
            pass.
        truncate_blocks: cut gradients through the memory before every so many blocks. None: gradients are exact.

    Raises:
        ValueError: a value is out of range.
    """

    segments_per_block: int | None = None
    checkpoint_layers: bool = False
    offload_states: bool = False
    truncate_blocks: int | None = None

    def __post_init__(self) -> None:
        if self.segments_per_block is not None and self.segments_per_block < 1:
            raise ValueError(
                f"segments_per_block={self.segments_per_block} must be at least 1, or None for all segments at once"
            )
        if self.truncate_blocks is not None and self.truncate_blocks < 1:
            raise ValueError(f"truncate_blocks={self.truncate_blocks} must be at least 1, or None for exact gradients")

    def block_segments(self, segment_length: int, training: bool) -> int | None:
        """Return how many segments a block has; None for all segments of the row."""
        if self.segments_per_block is not None or training:
            return self.segments_per_block
        return max(1, MAX_BLOCK_TOKENS // segment_length)
