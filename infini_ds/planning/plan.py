"""What a run will take, before any device is asked for: memory, operations, days, and what else would fit."""

import difflib
import math
from dataclasses import dataclass, replace

from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.recipe import Recipe
from infini_ds.model import InfiniGPTNeoConfig
from infini_ds.planning.hardware import PUBLISHED_BF16, training_flops_per_token
from infini_ds.planning.memory_estimate import (
    HEADROOM,
    MemoryEstimate,
    Workload,
    ZeroSharding,
    estimate_memory,
    largest_block,
)
from infini_ds.utils.errors import UserError


@dataclass(frozen=True)
class Device:
    """memory: bytes. flops: dense products a second in the run's precision, None where it is not known."""

    name: str
    memory: int
    flops: float | None


# GiB as the driver reports them, and the name in PUBLISHED_BF16.
CARDS = {
    "h200-141g": (140.4, "H200"),
    "h100-80g": (79.6, "H100"),
    "a100-80g": (79.3, "A100"),
    "a100-40g": (39.4, "A100"),
    "l40s-48g": (44.6, "L40S"),
    "a40-48g": (44.5, "A40"),
    "rtx4090-24g": (23.5, "RTX 4090"),
    "a10-24g": (22.1, "A10"),
    "l4-24g": (22.0, "L4"),
}


def card(name: str, precision: str) -> Device:
    """A card by name.

    Raises:
        UserError: it is not in CARDS.
    """
    if name not in CARDS:
        near = difflib.get_close_matches(name.lower(), CARDS, n=1)
        hint = f"did you mean {near[0]}" if near else f"known are {', '.join(CARDS)}"
        raise UserError(f"--gpu {name} is not known: {hint}; for another card give --memory GIB")
    memory, published = CARDS[name]
    return Device(name, int(memory * 2**30), PUBLISHED_BF16[published] if precision == "bf16" else None)


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    config: InfiniGPTNeoConfig
    shape: BatchShape
    device: Device
    asked: Workload
    sharding: ZeroSharding

    @property
    def room(self) -> int:
        """Bytes that a rank may take."""
        return int(self.device.memory * (1 - HEADROOM))

    @property
    def work(self) -> Workload:
        """With `segments_per_block: auto` resolved: the largest that fits, or 1."""
        if self.recipe.model.segments_per_block != "auto":
            return self.asked
        return self.asked.in_blocks_of(largest_block(self.asked, self.sharding, self.room) or 1)

    @property
    def estimate(self) -> MemoryEstimate:
        return estimate_memory(self.work, self.sharding)

    @property
    def fits(self) -> bool:
        return self.estimate.peak <= self.room

    @property
    def tokens(self) -> int:
        return self.recipe.steps * self.shape.rows * self.work.tokens

    def days(self, mfu: float) -> float | None:
        """Of training alone; recomputing is not counted in the MFU, so with checkpointing it is lower."""
        if self.device.flops is None:
            return None
        rate = self.device.flops * self.shape.data_size * mfu
        return self.tokens * training_flops_per_token(self.config) / rate / 86_400

    def choices(self) -> list[tuple[int, int | None, int | None]]:
        """Micro-batches of a rank that divide its rows, the largest block that fits with each, and the peak then."""
        found = []
        for rows in self._micro_rows():
            work = replace(self.work, rows=rows, accumulation=self.shape.rank_rows // rows)
            block = largest_block(work, self.sharding, self.room)
            peak = estimate_memory(work.in_blocks_of(block), self.sharding).peak if block else None
            found.append((rows, block, peak))
            if block is None:
                break
        return found

    def _micro_rows(self) -> list[int]:
        rows = self.shape.rank_rows
        return [r for r in range(1, rows + 1) if rows % r == 0]

    def remedy(self) -> str | None:
        """The first change with which a step fits, as overrides of the recipe; None if none was found."""
        work, given = replace(self.work, checkpointing=True), []
        if not self.work.checkpointing:
            given = ["model.gradient_checkpointing=true"]
            if estimate_memory(work, self.sharding).peak <= self.room:
                return " ".join(given)
        for rows in reversed([r for r in self._micro_rows() if r <= work.rows]):
            smaller = replace(work, rows=rows, accumulation=self.shape.rank_rows // rows)
            block = largest_block(smaller, self.sharding, self.room)
            if block:
                fewer = [] if rows == work.rows else [f"batch.micro_rows={rows}"]
                return " ".join([*given, *fewer, f"model.segments_per_block={block}"])
        least = [*given, "batch.micro_rows=1"]
        work = replace(work, rows=1, accumulation=self.shape.rank_rows)
        if not self.sharding.offload:
            block = largest_block(work, replace(self.sharding, offload=True), self.room)
            if block:
                offload = "deepspeed=ds_configs/zero2_offload.json"
                return " ".join([*least, f"model.segments_per_block={block}", offload])
        for doublings in range(1, 11):
            ranks = self.sharding.ranks << doublings
            if self.shape.rows % ranks == 0:
                work = replace(work, accumulation=math.ceil(self.shape.rows / ranks))
                block = largest_block(work, replace(self.sharding, ranks=ranks), self.room)
                if block:
                    return " ".join([*least, f"model.segments_per_block={block}", f"--gpus {ranks}"])
        return None
