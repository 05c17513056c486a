"""The recipe and its sections: every key with its type, bounds, default and meaning.

A key may change on resume (`resumable=True`) if the results of the run do not depend on it, or if the run is to end
otherwise: steps, schedule, validation, checkpoints, stability.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field

from infini_ds.config.key_types import (
    AddressText,
    ByteCount,
    FolderName,
    Interval,
    PathText,
    StepCount,
    interval,
    part,
    split_tasks,
)
from infini_ds.config.keys import Section, Words, key

SEED_LIMIT = 2**31  # epochs and ranks are added to a seed, and NumPy has to take the sum


class ModelSection(Section):
    """The model: a preset and what overrides it, or a folder to start from."""

    preset: str = key("tiny", "a named size, see the table of presets")
    start_from: PathText | None = key(None, "folder of an Infini-GPT-Neo whose weights and shape training starts from")
    segments_per_block: Annotated[int, Field(ge=1)] | Literal["auto"] | None = key(
        None,
        "segments that are computed at once; null: all of a row; auto: as many as fit into the device's memory",
        resumable=True,
    )
    segment_length: int | None = key(None, "tokens of a segment; null: 128, or as in the folder of start_from", ge=1)
    memory_rule: str | None = key(
        None,
        "how a segment is written to the memory: linear, softmax, delta, delta_paper, gated_delta; null: linear, or as "
        "in start_from",
    )
    position_embedding: Literal["segment", "rotary"] | None = key(
        None, "positions counted from the start of the segment, or rotary ones; null: segment, or as in start_from"
    )
    gate_init: float | None = key(
        None, "start of the gates beta; null: 0, which is half local attention and half memory, or as in start_from"
    )
    short_conv: int | None = key(
        None,
        "width of a learned convolution of keys and values, 2 for a token and the one before it; 0: none; null: 0, or "
        "as in start_from",
        ge=0,
    )
    embed_conv: int | None = key(
        None,
        "width of a learned convolution of the token embeddings, across the ends of segments; 0: none; null: 0, or as "
        "in start_from",
        ge=0,
    )
    gradient_checkpointing: bool = key(
        False, "keep only the memory between blocks, recompute each block in the backward pass", resumable=True
    )
    checkpoint_layers: bool = key(
        False, "keep only the inputs of a block's layers, recompute each layer in the backward pass", resumable=True
    )
    offload_states: bool = key(
        False, "with gradient_checkpointing: keep the memory between blocks in the host's memory", resumable=True
    )
    truncate_blocks: int | None = key(
        None, "cut gradients through the memory before every so many blocks; null: exact gradients", ge=1
    )
    attention: Literal["sdpa", "flex_attention"] = key(
        "sdpa",
        "implementation of local attention; flex_attention makes no mask for packed documents, and needs a GPU and "
        "dropout 0",
        resumable=True,
    )
    compile: bool = key(
        False, "compile the layers with torch.compile; the first step then takes a minute or more", resumable=True
    )
    config: dict[str, Any] = key({}, "any other field of InfiniGPTNeoConfig, such as model.config.hidden_size=256")


class StreamSection(Section):
    """One of several streams of data; either all of them have a proportion, or none."""

    path: AddressText = key(..., "a folder that data_prep wrote, or its address", resumable=True)
    proportion: float | None = key(
        None,
        "share of the rows of an epoch, relative to the other streams",
        gt=0,
        remedy="leave the stream out if nothing is to be taken from it",
    )
    repeat: float | None = key(
        None,
        "times that an epoch reads it; null: once",
        gt=0,
        remedy="leave the stream out if nothing is to be taken from it",
    )


class StageSection(Section):
    """One of the stages of a curriculum, which follow each other; the last one has no end of its own."""

    path: AddressText = key(..., "a folder that data_prep wrote, or its address", resumable=True)
    steps: Interval | None = key(
        None, "steps after which the next stage begins, a share rounded up; null: any number", resumable=True
    )
    until: float | None = key(
        None, "accuracy of recall at a validation from which on the next stage begins", gt=0, le=1, resumable=True
    )
    recall: str | None = key(
        None, "recall tasks that until is about, measured in this stage; null: validation.recall", resumable=True
    )

    def most_steps(self, steps: int) -> int | None:
        """Return the most steps of the stage, in a run of so many; None: no limit."""
        return None if self.steps is None else interval(self.steps, steps)

    @property
    def recall_tasks(self) -> tuple[str, ...]:
        """The recall tasks of this stage alone, one by one."""
        return split_tasks(self.recall)


class DataSection(Section):
    """The training data: path alone, streams, or a curriculum."""

    path: AddressText = key(
        "data/stdlib",
        "a folder that data_prep wrote, or its address (s3://, gs://, hf://, file://, ...)",
        resumable=True,
    )
    streams: Annotated[tuple[StreamSection, ...], Words("a list of streams, such as [{path: FOLDER}]")] = key(
        (), "several folders or addresses in place of path, each with its proportion or repeat", resumable=True
    )
    curriculum: Annotated[
        tuple[StageSection, ...], Words("a list of stages, such as [{path: FOLDER, until: 0.95}, {path: FOLDER}]")
    ] = key((), "several folders or addresses in place of path, one after the other", resumable=True)
    cache: PathText = key(
        "data/cache", "where shards of an address are kept, best on a disk of the node", resumable=True
    )
    cache_limit: ByteCount | None = key(
        None, "bytes that training shards may take in the cache; null: no limit", resumable=True
    )
    seed: int = key(0, "seed of the order of rows", ge=0, lt=SEED_LIMIT)
    workers: int = key(0, "processes of a rank that read ahead", ge=0, resumable=True)


class BatchSection(Section):
    """The global batch of an optimizer step: exactly one of tokens and rows."""

    tokens: int | None = key(None, "tokens of a step, over all ranks", ge=1)
    rows: int | None = key(None, "rows of a step, over all ranks", ge=1)
    micro_rows: int = key(1, "rows of a micro-batch of a rank, at most", ge=1, resumable=True)


class ParallelSection(Section):
    """How the ranks share the work: data ranks, which read different rows, times ranks that share each row."""

    sequence: int = key(
        1,
        "ranks over which the segments of each row are divided; a block then has segments_per_block on each of them",
        ge=1,
        resumable=True,
    )


class OptimizerSection(Section):
    """AdamW, or Muon for the matrices of the layers and AdamW for all other parameters. Adam moves a value by at most
    the sum of its learning rates, so the gates have a higher one.
    """

    kind: Literal["adamw", "muon"] = key("adamw", "muon: the matrices of the layers are trained by Muon")
    learning_rate: float = key(
        1e-3,
        "peak learning rate of what AdamW trains: all parameters but the gates and the matrices of Muon",
        ge=0,
    )
    muon_learning_rate: float = key(
        0.02, "peak learning rate of the matrices that Muon trains: the spectral norm of a step", ge=0
    )
    muon_momentum: float = key(0.95, "decay of Muon's momentum", ge=0, lt=1)
    gate_learning_rate: float = key(1e-2, "peak learning rate of the gates", ge=0)
    weight_decay: float = key(0.1, "weight decay of matrices and embeddings", ge=0)
    beta1: float = key(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = key(0.95, "decay of the second moment", ge=0, lt=1)
    eps: float = key(1e-8, "added to the root of the second moment", ge=0)
    gradient_clipping: float = key(1.0, "largest norm of the gradient of all parameters; 0: no clipping", ge=0)

    @property
    def rates_of_weights(self) -> str:
        """The learning rates of all parameters but the gates, as keys with values."""
        rate = f"optimizer.learning_rate={self.learning_rate}"
        return f"optimizer.muon_learning_rate={self.muon_learning_rate} and {rate}" if self.kind == "muon" else rate


class ScheduleSection(Section):
    """The learning rate over the steps: linear warm-up, then the schedule's kind."""

    kind: Literal["cosine", "wsd", "constant"] = key(
        "cosine",
        "cosine: down over all steps after the warm-up; wsd: stable, then linearly down in the last decay_steps; "
        "constant",
        resumable=True,
    )
    warmup_steps: StepCount = key(
        100, "steps of linear warm-up, a share rounded down; the gates have none", resumable=True
    )
    decay_steps: StepCount = key(
        0, "steps of the decay, for wsd; a share rounded down, but at least 1 step", resumable=True
    )
    final_ratio: float = key(0.1, "share of the peak learning rate that the decay ends at", ge=0, le=1, resumable=True)
    gates: Literal["same", "constant"] = key(
        "same", "whether the gates' learning rate follows the schedule or stays constant", resumable=True
    )

    def warmup(self, steps: int) -> int:
        """Return the steps of the warm-up, in a run of so many."""
        return self.warmup_steps if isinstance(self.warmup_steps, int) else math.floor(part(self.warmup_steps, steps))

    def decay(self, steps: int) -> int:
        """Return the steps of the decay, in a run of so many."""
        decay = self.decay_steps
        return decay if isinstance(decay, int) else max(1, math.floor(part(decay, steps)))


class ValidationSection(Section):
    """Validation during training."""

    every: StepCount = key(
        100,
        "steps between validations, a share rounded up; also before the first step and after the last; 0: never",
        resumable=True,
    )
    rows: int = key(
        32, "validation rows that are read, from the first on; all, if there are fewer", ge=1, resumable=True
    )
    recall: str | None = key(
        None,
        "recall tasks whose accuracy each validation measures, such as pairs,first=key,distance=512; + joins several",
        resumable=True,
    )
    recall_examples: int = key(64, "examples of each recall task", ge=1, resumable=True)

    @property
    def recall_tasks(self) -> tuple[str, ...]:
        """The recall tasks, one by one."""
        return split_tasks(self.recall)

    def interval(self, steps: int) -> int:
        """Return the steps between validations, in a run of so many; 0: never."""
        return interval(self.every, steps)


class CheckpointSection(Section):
    """When checkpoints are written, and which are kept."""

    every: Interval = key(
        500, "steps between checkpoints, a share rounded up; the last step always writes one", resumable=True
    )
    keep_last: int = key(2, "how many of the newest checkpoints are kept", ge=1, resumable=True)
    keep_every: int = key(0, "checkpoints whose step it divides are kept too; 0: none", ge=0, resumable=True)
    keep_best: bool = key(
        False,
        "keep the checkpoint with the lowest validation loss too; every has to be a multiple of validation.every",
        resumable=True,
    )

    def interval(self, steps: int) -> int:
        """Return the steps between checkpoints, in a run of so many."""
        return interval(self.every, steps)


class StabilitySection(Section):
    """Non-finite losses and gradients, loss spikes, and rollback to an earlier checkpoint."""

    max_consecutive_skips: int = key(
        10,
        "consecutive steps that are skipped for a non-finite loss or gradient before a rollback",
        ge=1,
        resumable=True,
    )
    max_rollbacks: int = key(
        2, "rollbacks to the same checkpoint before the run ends with an error", ge=0, resumable=True
    )
    spike_sigmas: float = key(
        8.0,
        "standard deviations above the recent mean that make a loss a spike; 0: no loss is a spike",
        ge=0,
        resumable=True,
    )
    spike_window: int = key(
        100,
        "steps that mean and deviation are taken over; no loss is a spike before so many steps",
        ge=2,  # one step has no deviation
        resumable=True,
    )
    on_spike: Literal["flag", "roll_back"] = key(
        "flag", "whether a spike is only logged, or rolled back", resumable=True
    )
    spike_batches: int = key(
        10,
        "batches whose rows are skipped after a spike is rolled back, the spike's own included",
        ge=1,
        resumable=True,
    )
    check_gradients: bool = key(
        False, "compare the gradients of the first step with an unsharded recompute, at each start", resumable=True
    )


class PlanSection(Section):
    """What a plan assumes, and the hardware that a shipped recipe is for. Training does not read it."""

    gpu: str | None = key(None, "name of a GPU; null: this machine's device", resumable=True)
    memory: float | None = key(None, "GiB of a GPU, in place of the named one's", gt=0, resumable=True)
    gpus: int = key(1, "number of ranks", ge=1, resumable=True)
    mfu: float = key(
        0.4, "share of the device's peak FLOPS that training reaches, recompute not counted", gt=0, le=1, resumable=True
    )
    sequence_length: int | None = key(None, "tokens of a row; null: as in the data", ge=1, resumable=True)


class Recipe(Section):
    """The run."""

    name: FolderName = key("run", "name of the run; its folder is output/name", resumable=True)
    output: PathText = key("runs", "folder of all runs", resumable=True)
    steps: int = key(1000, "optimizer steps of the complete run", ge=1, resumable=True)
    seed: int = key(0, "seed of the weights and of dropout", ge=0, lt=SEED_LIMIT)
    precision: Literal["auto", "fp32", "bf16"] = key("auto", "auto: bf16 on a GPU with instructions for it, else fp32")
    deepspeed: PathText = key("auto", "a DeepSpeed JSON file; auto: by device, from ds_configs/", resumable=True)
    resume: bool = key(
        True, "resume from the newest checkpoint; false: refuse a folder that has checkpoints", resumable=True
    )
    log_every: int = key(10, "steps between logged metrics", ge=1, resumable=True)
    timeout_minutes: float = key(
        30.0,
        "minutes that a rank waits for another one before the run ends with an error",
        gt=0,
        lt=1e6,
        resumable=True,
    )
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    batch: BatchSection = BatchSection()
    parallel: ParallelSection = ParallelSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    stability: StabilitySection = StabilitySection()
    plan: PlanSection = PlanSection()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output) / self.name

    def to_yaml(self) -> str:
        """Return all keys as YAML, which `load_recipe` reads to an equal recipe."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json")))
