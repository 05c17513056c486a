"""Plan a run before any device is asked for: its memory, FLOPs and days, and which micro-batches and blocks would fit.

plan = make_plan(load_recipe("launch/recipes/1.3b.yaml"))
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from infini_ds.config.recipe import Recipe
from infini_ds.config.resolve import ResolvedRun, resolve
from infini_ds.distributed.environment import detect_environment
from infini_ds.model.memory_rule import get_memory_rule
from infini_ds.planning.flops import training_flops_per_token
from infini_ds.planning.hardware import LINKS, Link, find_gpu, memory_free, peak_flops
from infini_ds.planning.memory_estimate import (
    HEADROOM,
    BlockSearch,
    MemoryEstimate,
    Workload,
    ZeroSharding,
    estimate_memory,
    parameters,
)
from infini_ds.planning.traffic import SequenceTraffic, zero_bytes

GIB = 2**30


@dataclass(frozen=True)
class PlannedDevice:
    """The device of each rank.

    Attributes:
        memory: bytes.
        peak_flops: FLOP/s of dense matrix products in the run's precision; None if unknown.
        links: to the GPUs of its node, and to other nodes; None if unknown.
    """

    name: str
    memory: int
    peak_flops: float | None
    links: tuple[Link, Link] | None = None


@dataclass(frozen=True)
class FittingBlock:
    """The most segments in a block that fit with micro-batches of `rows` rows, and the peak of memory then; None if
    not even one segment fits.
    """

    rows: int
    segments: int | None
    peak: int | None


@dataclass(frozen=True)
class Plan:
    """What a run will take on `run.dims.world_size` devices."""

    run: ResolvedRun
    device: PlannedDevice

    @property
    def memory_limit(self) -> int:
        """Bytes that a rank may take."""
        return int(self.device.memory * (1 - HEADROOM))

    @cached_property
    def work(self) -> Workload:
        """What a rank computes. For "auto", in the largest blocks that fit, or of one segment if none fits."""
        run = self.run
        work = Workload.of(run.recipe, run.model_config, run.batch_shape, run.sequence_length, run.precision)
        if run.recipe.model.segments_per_block != "auto":
            return work
        return work.in_blocks_of(self._search.largest_block(work, self.sharding) or 1)

    @cached_property
    def sharding(self) -> ZeroSharding:
        return ZeroSharding.from_json(self.run.deepspeed, self.run.dims.world_size)

    @cached_property
    def estimate(self) -> MemoryEstimate:
        return estimate_memory(self.work, self.sharding)

    @property
    def fits(self) -> bool:
        return self.estimate.peak <= self.memory_limit

    @cached_property
    def parameters(self) -> int:
        return parameters(self.run.model_config)

    @property
    def flops_per_token(self) -> float:
        return training_flops_per_token(self.run.model_config)

    @property
    def tokens(self) -> int:
        """Tokens of all steps; of a curriculum, if all are as large as those of the stage that takes most memory."""
        return self.run.recipe.steps * self.run.batch_shape.rows * self.run.sequence_length

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step at the recipe's MFU, which does not count recomputation and is therefore lower with
        checkpointing; None if the device's peak is unknown.
        """
        if self.device.peak_flops is None:
            return None
        rate = self.device.peak_flops * self.run.dims.world_size * self.run.recipe.plan.mfu
        return self.run.batch_shape.rows * self.run.sequence_length * self.flops_per_token / rate

    @property
    def days(self) -> float | None:
        """Days of training without validation; None if the device's peak is unknown."""
        return None if self.step_seconds is None else self.run.recipe.steps * self.step_seconds / 86_400

    @cached_property
    def sequence_traffic(self) -> SequenceTraffic:
        """What the ranks over which a row is divided exchange in a step."""
        return SequenceTraffic.of(self.work)

    @property
    def zero_bytes(self) -> int:
        """Bytes of gradients and weights that a rank sends in a step."""
        return zero_bytes(self.work, self.sharding, self.parameters)

    def fitting_blocks(self) -> list[FittingBlock]:
        """Return the largest block that fits for each micro-batch that divides a rank's rows, up to the first one with
        which none fits.
        """
        found = []
        for rows in self._micro_batches():
            work = self._with_rows(self.work, rows)
            segments = self._search.largest_block(work, self.sharding)
            peak = estimate_memory(work.in_blocks_of(segments), self.sharding).peak if segments else None
            found.append(FittingBlock(rows, segments, peak))
            if segments is None:
                break
        return found

    def remedy(self) -> str | None:
        """Return the overrides of the recipe with which a step fits, with as few changes as possible; None if there are
        none. Tried in turn: checkpointing, smaller blocks, smaller micro-batches, rows divided over the ranks,
        offloading, more ranks, and rows divided over more ranks.
        """
        return next(self._remedies(), None)

    def _remedies(self) -> Iterator[str]:
        work, given = replace(self.work, checkpointing=True), []
        if not self.work.checkpointing:
            given = ["model.gradient_checkpointing=true"]
            if estimate_memory(work, self.sharding).peak <= self.memory_limit:
                yield " ".join(given)
        for rows in reversed([rows for rows in self._micro_batches() if rows <= work.rows]):
            smaller = [] if rows == work.rows else [f"batch.micro_rows={rows}"]
            segments = self._search.largest_block(self._with_rows(work, rows), self.sharding)
            if segments:
                yield " ".join([*given, *smaller, f"model.segments_per_block={segments}"])
        given, work = [*given, "batch.micro_rows=1"], self._with_rows(work, 1)
        yield from self._divided(work, given, self.sharding.ranks)
        if not self.sharding.offload:
            segments = self._search.largest_block(work, replace(self.sharding, offload=True))
            if segments:
                offload = "deepspeed=ds_configs/zero2_offload.json"
                yield " ".join([*given, f"model.segments_per_block={segments}", offload])
        for ranks in (self.sharding.ranks << doublings for doublings in range(1, 11)):
            data_ranks = ranks // work.sequence
            if self.run.batch_shape.rows % data_ranks == 0:
                work = replace(work, accumulation=self.run.batch_shape.rows // data_ranks)
                segments = self._search.largest_block(work, replace(self.sharding, ranks=ranks))
                if segments:
                    yield " ".join([*given, f"model.segments_per_block={segments}", f"--gpus {ranks}"])
            yield from self._divided(work, [*given, f"--gpus {ranks}"], ranks)

    def _divided(self, work: Workload, given: list[str], ranks: int) -> Iterator[str]:
        """Yield the overrides with which rows fit that are divided over more of `ranks` ranks, the fewest first."""
        if not get_memory_rule(work.config.memory_rule).can_be_divided:
            return
        rows = self.run.batch_shape.rows
        for K in (K for K in range(2 * work.sequence, min(ranks, work.segments) + 1) if ranks % K == 0):
            if rows * K % ranks == 0:
                divided = replace(work, sequence=K, accumulation=rows * K // ranks)
                search = BlockSearch(self.memory_limit)
                segments = search.largest_block(divided, replace(self.sharding, ranks=ranks))
                if segments:
                    yield " ".join([*given, f"parallel.sequence={K}", f"model.segments_per_block={segments}"])

    @cached_property
    def _search(self) -> BlockSearch:
        return BlockSearch(self.memory_limit)

    def _micro_batches(self) -> list[int]:
        rows = self.run.batch_shape.rank_rows
        return [divisor for divisor in range(1, rows + 1) if rows % divisor == 0]

    def _with_rows(self, work: Workload, rows: int) -> Workload:
        return replace(work, rows=rows, accumulation=self.run.batch_shape.rank_rows // rows)


def make_plan(recipe: Recipe) -> Plan:
    """Resolve a recipe for the ranks and the GPU of its `plan` section; without a GPU, for this machine.

    Raises:
        UserError: the recipe is not possible, the GPU is unknown, or the data is not prepared and
            `plan.sequence_length` is not given.
    """
    chosen, ranks = recipe.plan, recipe.plan.gpus
    environment = replace(detect_environment(), rank=0, local_rank=0, world_size=ranks, local_world_size=ranks)
    gpu = None if chosen.gpu is None else find_gpu(chosen.gpu)
    gib = chosen.memory or (gpu and gpu.memory_gib)
    run = resolve(recipe, environment, require_data=False, device_type="cuda" if gib else None).at_largest_stage()
    if not gib:
        name = f"this machine ({environment.device.type})"
        flops = peak_flops(environment.device, run.precision)
        return Plan(run, PlannedDevice(name, memory_free(environment), flops))
    name = gpu.name if gpu else "GPU"
    if chosen.memory:
        name = f"{name} of {chosen.memory:g} GiB"
    published = gpu.bf16_flops if gpu and run.precision == "bf16" else None
    links = (LINKS[gpu.links[0]], LINKS[gpu.links[1]]) if gpu else None
    return Plan(run, PlannedDevice(name, int(gib * GIB), published, links))
