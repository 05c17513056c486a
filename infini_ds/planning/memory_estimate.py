"""Estimate the memory of a training step on one rank, without a device and before a model is built.

What the model takes is measured by running it on fake tensors (`step_trace.py`). What ZeRO adds is computed by the
formulas of this file, which follow DeepSpeed 0.19 (`runtime/zero/stage_1_and_2.py`). A step has its peak at one of
three moments: *computing*, before the first gradient is complete; *reducing*, while DeepSpeed takes the gradients; and
the optimizer's *step*. `tests/planning/test_memory_estimate.py` compares the estimate with the memory that PyTorch's
allocator reports for real steps.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.model_config import block_schedule
from infini_ds.config.recipe import Recipe
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig
from infini_ds.model.memory_rule import get_memory_rule
from infini_ds.planning.step_trace import MicroBatch, Reading, parameter_sizes, trace

BYTES = {"fp32": 4, "bf16": 2}
MAX_BLOCK_SEGMENTS = 32  # of an automatic choice: larger blocks were not faster, see docs/training.md
HEADROOM = 0.1  # of a device's memory: fragmentation, communication, CUDA's context, errors of the estimate


@dataclass(frozen=True)
class Workload:
    """What one rank computes in a step.

    Attributes:
        rows, tokens: shape of the input of a micro-batch: of complete rows.
        precision: "fp32" or "bf16".
        schedule: how the model runs over the segments of a row.
        accumulation: micro-batches in a step.
        packed: rows may hold several documents, so that attention needs masks.
        checkpointing: the activations of a block are recomputed in its backward pass.
        sequence: ranks over which the segments of each row are divided.
    """

    config: InfiniGPTNeoConfig
    rows: int
    tokens: int
    precision: str
    schedule: BlockSchedule = field(default_factory=BlockSchedule)
    accumulation: int = 1
    packed: bool = True
    checkpointing: bool = False
    sequence: int = 1

    @classmethod
    def of(
        cls, recipe: Recipe, config: InfiniGPTNeoConfig, shape: BatchShape, tokens: int, precision: str
    ) -> "Workload":
        """Return the workload of a recipe. Rows may hold several documents, and "auto" segments are all segments."""
        return cls(
            config=config,
            rows=shape.micro_rows,
            tokens=tokens,
            precision=precision,
            schedule=block_schedule(recipe),
            accumulation=shape.accumulation,
            checkpointing=recipe.model.gradient_checkpointing,
            sequence=recipe.parallel.sequence,
        )

    def in_blocks_of(self, segments: int) -> "Workload":
        """Return the same workload with `segments` segments in a block."""
        return replace(self, schedule=replace(self.schedule, segments_per_block=segments))

    @property
    def segment_length(self) -> int:
        """Tokens of a segment; those of the row where it is shorter."""
        return min(self.config.segment_length, self.tokens)

    @property
    def segments(self) -> int:
        """Segments of a row."""
        return math.ceil(self.tokens / self.segment_length)

    @property
    def rank_segments(self) -> int:
        """Segments of a row that a rank computes."""
        return math.ceil(self.segments / self.sequence)

    @property
    def block_segments(self) -> int:
        """Segments of a block that a rank computes."""
        return min(self.schedule.segments_per_block or self.rank_segments, self.rank_segments)

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return math.ceil(self.rank_segments / self.block_segments)

    @property
    def micro_batch(self) -> MicroBatch:
        """What the model computes at a time."""
        return MicroBatch(
            config=self.config.to_json_string(use_diff=False),
            attention=self.config._attn_implementation,
            rows=self.rows,
            tokens=self.tokens,
            precision=self.precision,
            schedule=self.schedule,
            packed=self.packed,
            checkpointing=self.checkpointing,
            sequence=self.sequence,
        )


@dataclass(frozen=True)
class ZeroSharding:
    """What of DeepSpeed's configuration affects memory.

    Attributes:
        ranks: across which the optimizer's state is sharded.
        stage: of ZeRO; stage 1 is estimated as stage 2.
        offload: the optimizer's state is in the host's memory.
        bucket: elements of a buffer in which gradients are reduced.
        buffers: how many of these buffers are used.
    """

    ranks: int
    stage: int = 2
    offload: bool = False
    bucket: int = 500_000_000
    buffers: int = 1

    @classmethod
    def from_json(cls, config: dict, ranks: int) -> "ZeroSharding":
        """Read the configuration for `deepspeed.initialize`."""
        zero = config["zero_optimization"]
        return cls(
            ranks=ranks,
            stage=zero["stage"],
            offload=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
            bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
            buffers=(2 if zero.get("overlap_comm") else 1) if zero.get("contiguous_gradients", True) else 0,
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, by part, at three moments of a step.

    Attributes:
        computing: of forward and backward pass, before the first gradient of a weight is complete.
        reducing: while gradients are reduced.
        step: of the optimizer.
        host: what offloading takes of the host's memory.
    """

    computing: dict[str, int]
    reducing: dict[str, int]
    step: dict[str, int]
    host: int

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in (self.computing, self.reducing, self.step))


def parameters(config: InfiniGPTNeoConfig) -> int:
    """Return the number of the model's parameters."""
    return sum(parameter_sizes(config.to_json_string(use_diff=False)))


def estimate_memory(work: Workload, sharding: ZeroSharding) -> MemoryEstimate:
    """Estimate the memory of one rank in a step of `work`."""
    found = trace(work.micro_batch)
    size, sizes = BYTES[work.precision], parameter_sizes(work.micro_batch.config)
    share = math.ceil(sum(sizes) / sharding.ranks)
    # fp32 weights and two moments; or, with these in the host's memory, a buffer for the largest gradient.
    optimizer = size * max(sizes) if sharding.offload else 12 * share
    always = {"weights": size * sum(sizes), "optimizer": optimizer}
    # DeepSpeed sums the gradients of a rank's partition in fp32: for bf16 in one buffer, to which each reduced bucket
    # is added, for fp32 in a new tensor for each micro-batch.
    one_buffer = work.precision == "bf16"
    partition = 0 if sharding.offload and not one_buffer else 4 * share
    earlier = partition if work.accumulation > 1 else 0  # of the micro-batches before

    def moment(reading: Reading, sums: int, buckets: float = 0) -> dict[str, int]:
        parts = {
            "gradients": sums + reading.gradients,
            "reduce buckets": buckets,
            "activations and loss": reading.live - reading.gradients,
        }
        return always | {name: round(part) for name, part in parts.items()}

    reducing = [
        moment(*arguments) for arguments in _reduce(found.reducing, size, sharding, partition, earlier, one_buffer)
    ]
    step = always | {"gradients": partition}
    if not sharding.offload:
        step["flattened gradients"] = 0 if one_buffer else partition
    host = (12 + 4 + size) * share if sharding.offload else 0
    if work.checkpointing and work.schedule.offload_states:
        host += found.states * work.blocks
    return MemoryEstimate(
        computing=moment(found.computing, earlier),
        reducing=max(reducing, key=lambda parts: sum(parts.values())),
        step=step,
        host=host,
    )


def _reduce(
    readings: tuple[Reading, ...], size: int, sharding: ZeroSharding, partition: int, earlier: int, one_buffer: bool
) -> Iterator[tuple[Reading, int, float]]:
    """Yield readings with the bytes of the summed gradients and of the buckets at that moment.

    The buckets exist from the first gradient on. Each gradient moves into the bucket. If it does not fit, the bucket
    is reduced first, as a copy. A gradient that is larger than a bucket is reduced by itself.

    Args:
        size: bytes of an element of a gradient.
        partition: bytes of the sums of one micro-batch, `earlier`: of the micro-batches before.
        one_buffer: the sums of all micro-batches are in one buffer, to which gradients are added as copies in fp32.
    """
    buffers = size * sharding.bucket * sharding.buffers
    sums, bucket, oversized = earlier, [0.0], 0.0
    end = readings[-1]._replace(elements=math.inf)  # what is left in the bucket is reduced at the end
    for reading in (*readings, end):
        if reading.elements and sum(bucket) + reading.elements > sharding.bucket:
            before = _with_gradient(reading, oversized)
            # Slices are joined by a copy: those of several ranks, and for one rank those with sums of their own.
            is_copied = sharding.ranks > 1 or (one_buffer and len(bucket) > 2)
            copy = size * sum(bucket) if is_copied else 0
            if one_buffer:
                sums = partition  # built before the first reduction, and not after it
                copy += min(partition, 4 * max(bucket))
            yield before, sums, buffers + copy
            sums = partition if one_buffer else earlier + partition
            bucket, oversized = [0.0], 0.0
        yield _with_gradient(reading, oversized), sums, buffers
        bucket.append(reading.elements)
        if reading.elements > sharding.bucket:
            oversized = size * reading.elements


def _with_gradient(reading: Reading, size: float) -> Reading:
    return reading._replace(live=reading.live + size, gradients=reading.gradients + size)


def largest_block(work: Workload, sharding: ZeroSharding, limit: int) -> int | None:
    """Return the most segments in a block, up to MAX_BLOCK_SEGMENTS, with which a step fits into `limit` bytes; None if
    not even one segment fits.
    """
    return BlockSearch(limit).largest_block(work, sharding)


class BlockSearch:
    """Finds the largest blocks that fit into `limit` bytes, for workloads of one model, with few estimates.

    Memory grows nearly linearly with the rows times segments of a block, apart from the states between blocks, of which
    there are fewer the larger the blocks are. So the search interpolates between what was estimated before. A block
    that would exceed the limit even if memory grew by a tenth less is not estimated.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._points: list[tuple[int, int]] = []  # rows times segments of a block, bytes while computing but of states

    def largest_block(self, work: Workload, sharding: ZeroSharding) -> int | None:
        """Return the most segments in a block that fit, as the function of this name."""
        fits, fails = 0, min(MAX_BLOCK_SEGMENTS, work.rank_segments) + 1
        while fails - fits > 1:
            # With all activations kept, memory hardly depends on the block.
            by_line = work.checkpointing or not self._points
            guess = self._guess(work, fits, fails) if by_line else (fits + fails) // 2
            estimate = estimate_memory(work.in_blocks_of(guess), sharding)
            without_states = sum(estimate.computing.values()) - _state_bytes(work.in_blocks_of(guess))
            self._points.append((guess * work.rows, without_states))
            if estimate.peak > self._limit:
                fails = guess
                continue
            fits = guess
            on_a_line = len({size for size, _ in self._points}) > 1
            if on_a_line and self._predict(work.in_blocks_of(guess + 1), 0.9) > self._limit:
                break
        return fits or None

    def _guess(self, work: Workload, fits: int, fails: int) -> int:
        """Return the most segments between `fits` and `fails` that may fit; if none may, those that take the least."""
        between = range(fails - 1, fits, -1)
        if not self._points:
            return between[0]
        predicted = {segments: self._predict(work.in_blocks_of(segments)) for segments in between}
        fitting = (segments for segments in between if predicted[segments] <= self._limit)
        return next(fitting, min(predicted, key=predicted.__getitem__))

    def _predict(self, work: Workload, factor: float = 1.0) -> float:
        """Return the bytes while computing, on the line through the last point with `factor` times its slope."""
        size, peak = self._points[-1]
        return peak + factor * (work.block_segments * work.rows - size) * self._slope() + _state_bytes(work)

    def _slope(self) -> float:
        """Return the bytes of one more segment of a row, by the last two sizes; from a single one, at most so many."""
        (size, peak), *earlier = reversed(self._points)
        other, peak_of_other = next((point for point in earlier if point[0] != size), (0, 0))
        return max(1.0, (peak - peak_of_other) / (size - other))


def _state_bytes(work: Workload) -> int:
    """Return the bytes on the device of the states that are kept between blocks."""
    if not work.checkpointing or work.schedule.offload_states:
        return 0
    config = work.config
    rule, shape = get_memory_rule(config.memory_rule), (work.rows, config.num_heads, config.head_dim)
    state = rule.empty_state(*shape, torch.float32, "meta")
    return sum(x.nbytes for x in state) * config.num_layers * work.blocks
