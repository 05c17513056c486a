"""A recipe: every choice of a training run, read from YAML and `key=value` overrides and checked before work starts.

recipe = load_recipe("launch/recipes/tiny-cpu.yaml", ["steps=100", "model.segment_length=64"])
"""

import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.options import byte_count
from infini_ds.utils.errors import UserError


@dataclass(frozen=True)
class ModelRecipe:
    """`preset` and fields of `InfiniGPTNeoConfig` that override it, or a Hugging Face folder to go on from."""

    preset: str = "tiny"
    start_from: str | None = None  # folder of an Infini-GPT-Neo, e.g. from launch/convert.py; its shape is taken
    segments_per_block: int | str | None = None  # None: the whole sequence at once; "auto": what fits the device
    # None: as InfiniGPTNeoConfig has it, or the folder in start_from
    segment_length: int | None = None
    memory_rule: str | None = None
    position_embedding: str | None = None
    gate_init: float | None = None
    gradient_checkpointing: bool = False  # compute each block of segments again in the backward pass
    checkpoint_layers: bool = False  # and each layer of it by itself
    offload_states: bool = False  # keep the memory between blocks in the host's memory
    truncate_blocks: int | None = None  # cut gradients through the memory before every so many blocks; None: exact
    attention: str = "sdpa"  # or "flex_attention": packed documents without a mask in memory, on a GPU
    compile: bool = False  # compile the layers with torch.compile
    config: dict[str, Any] = field(default_factory=dict)  # any other field, e.g. model.config.hidden_size=256


@dataclass(frozen=True)
class StreamRecipe:
    """One of several streams; either all of them have a proportion, or none."""

    path: str = ""  # a folder that data_prep wrote, or its address
    proportion: float | None = None  # share of the rows of an epoch, relative to the other streams
    repeat: float | None = None  # times that an epoch passes over it, once if neither is given


@dataclass(frozen=True)
class DataRecipe:
    path: str = "data/stdlib"  # a folder that data_prep wrote, or its address: s3://..., gs://..., hf://..., file://...
    streams: list[StreamRecipe] = field(default_factory=list)  # in place of path
    cache: str = "data/cache"  # where shards of an address are kept, best on a disk of the node
    cache_limit: str | None = None  # bytes that training shards may take there, such as 200GB; None: all of them
    seed: int = 0  # of the order of rows
    workers: int = 0  # processes a rank that read ahead


@dataclass(frozen=True)
class BatchRecipe:
    """Of one step, over all ranks: give `tokens` or `rows`. A rank computes `micro_rows` rows, or fewer, at a time."""

    tokens: int | None = None
    rows: int | None = None
    micro_rows: int = 1


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW. Adam moves a value by at most the sum of its learning rates, so the gates have a higher one."""

    learning_rate: float = 1e-3
    gate_learning_rate: float = 1e-2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    gradient_clipping: float = 1.0


@dataclass(frozen=True)
class ScheduleRecipe:
    """Warm-up, then `cosine`, `wsd` (stable, then linear decay in the last `decay_steps`), or `constant`."""

    kind: str = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 0
    final_ratio: float = 0.1  # of the peak learning rate, at the last step
    gates: str = "same"  # or "constant": the gates' learning rate is not decayed


@dataclass(frozen=True)
class ValidationRecipe:
    every: int = 100  # steps; 0: never
    rows: int = 32


@dataclass(frozen=True)
class CheckpointRecipe:
    every: int = 500  # steps; the last step always writes one
    keep_last: int = 2
    keep_every: int = 0  # steps: those whose step it divides are kept too; 0: none
    keep_best: bool = False  # keep the one with the lowest validation loss too


@dataclass(frozen=True)
class PlanRecipe:
    """What launch/plan.py assumes, and the hardware that a shipped recipe is for. Training does not look at it."""

    gpu: str | None = None  # a name in infini_ds/planning/plan.py; None: this machine
    memory: float | None = None  # GiB of a GPU, in place of the named one's
    gpus: int = 1
    mfu: float = 0.4
    sequence_length: int | None = None  # of rows; None: the data's


@dataclass(frozen=True)
class StabilityRecipe:
    """What is watched, and when a run goes back to its last good checkpoint and passes over rows."""

    max_consecutive_skips: int = 10  # steps without a finite loss or gradient, before the run goes back
    max_rollbacks: int = 2  # times that it goes back to the same checkpoint, before it ends with an error
    spike_sigmas: float = 8.0  # standard deviations above the recent mean that make a loss a spike; 0: nothing is one
    spike_window: int = 100  # steps that mean and deviation are taken over; before so many, nothing is a spike
    on_spike: str = "flag"  # or roll_back
    spike_batches: int = 10  # that are passed over for a spike, up to its own
    check_gradients: bool = False  # compare the first step's gradients with an unsharded recompute, at each start


@dataclass(frozen=True)
class Recipe:
    name: str = "run"  # of the run: its folder is output/name
    output: str = "runs"
    steps: int = 1000
    seed: int = 0  # of the weights
    precision: str = "auto"  # fp32, bf16, or auto: bf16 on a GPU that has it, else fp32
    deepspeed: str = "auto"  # a DeepSpeed JSON file, or auto: by device, from ds_configs/
    resume: bool = True  # go on from the newest checkpoint of the run, if there is one
    log_every: int = 10  # steps
    timeout_minutes: float = 30.0  # that a rank waits for another one before the run ends with an error
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    batch: BatchRecipe = field(default_factory=BatchRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    validation: ValidationRecipe = field(default_factory=ValidationRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    stability: StabilityRecipe = field(default_factory=StabilityRecipe)
    plan: PlanRecipe = field(default_factory=PlanRecipe)

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name


def load_recipe(path: str | Path | None, overrides: list[str] = ()) -> Recipe:
    """The defaults, then the YAML file, then `key=value` overrides.

    Raises:
        UserError: no such file, an unknown key (the nearest known one is named), or a value that cannot be.
    """
    recipe = load_keys(Recipe, path, overrides, "--config", "launch/recipes", free=("model.config.",))
    check(recipe)
    return recipe


def load_keys(
    kind: type, path: str | Path | None, overrides: list[str], option: str, shipped: str, free: tuple[str, ...] = ()
) -> Any:
    """An object of the dataclass `kind`: its defaults, then a YAML file, then `key=value` overrides.

    Args:
        option: what names the file on the command line.
        shipped: folder of the project's own such files, to name where there is no such file.
        free: beginnings of keys below which any key is allowed.
    Raises:
        UserError: as `load_recipe`.
    """
    schema = OmegaConf.structured(kind)
    layers = []
    if path is not None:
        if not Path(path).is_file():
            known = ", ".join(sorted(str(p) for p in Path(shipped).glob("*.yaml")))
            raise UserError(f"{option} {path}: there is no such file" + (f"; there are {known}" if known else ""))
        try:
            layers.append((str(path), OmegaConf.load(path)))
        except Exception as error:  # yaml's own errors are of many kinds
            raise UserError(f"{option} {path} is not YAML that can be read: {error}") from error
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} is not of the form key=value, such as steps=100")
    try:
        layers.append(("the command line", OmegaConf.from_dotlist(list(overrides))))
    except Exception as error:  # yaml's own errors are of many kinds
        raise UserError(f"{' '.join(overrides)} cannot be read as key=value: {error}".replace("\n", " ")) from error
    for origin, layer in layers:
        if not OmegaConf.is_dict(layer):
            raise UserError(f"{origin} holds a list, not keys and values")
        _check_keys(layer, schema, origin, kind, free)
        try:
            schema = OmegaConf.merge(schema, layer)
        except OmegaConfBaseException as error:
            reason = str(error.msg if getattr(error, "msg", None) else error).splitlines()[0]
            raise UserError(f"{error.full_key} in {origin}: {reason}") from error
    return OmegaConf.to_object(schema)


def _check_keys(given, known, origin: str, kind: type, free: tuple[str, ...], prefix: str = "") -> None:
    for key, value in given.items():
        name = f"{prefix}{key}"
        if name.startswith(free):
            continue  # what is allowed there is checked where it is used
        if key not in known:
            names = [*_leaves(OmegaConf.structured(kind)), *(f"{prefix}{group}" for group in known)]
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            near = near or [full for full in names if full.split(".")[-1] == str(key).split(".")[-1]]
            hint = f": did you mean {near[0]}?" if near else f"; known are {', '.join(str(k) for k in known)}"
            raise UserError(f"unknown key {name} in {origin}{hint}")
        if OmegaConf.is_dict(value) != OmegaConf.is_dict(known[key]):
            form = (
                f"a group of keys, such as {name}.{next(iter(known[key]), 'KEY')}"
                if OmegaConf.is_dict(known[key])
                else "a value"
            )
            raise UserError(f"{name} in {origin} has to be {form}")
        if OmegaConf.is_dict(value):
            _check_keys(value, known[key], origin, kind, free, f"{name}.")


def _leaves(node, prefix: str = "") -> list[str]:
    names = []
    for key in node:
        value = node._get_node(key)
        names += _leaves(value, f"{prefix}{key}.") if OmegaConf.is_dict(value) else [f"{prefix}{key}"]
    return names


def check(recipe: Recipe) -> None:
    """Raise a UserError that names the key, its value and the remedy, for what no run could do."""

    def one_of(key: str, value: str, *allowed: str) -> None:
        if value not in allowed:
            raise UserError(f"{key}={value!r} is not one of {', '.join(allowed)}")

    def at_least(key: str, value: float, least: float) -> None:
        if not least <= value < math.inf:  # so written, it also refuses what is no number
            finite = " and finite" if value == math.inf else ""
            raise UserError(f"{key}={value} must be at least {least}{finite}")

    one_of("precision", recipe.precision, "auto", "fp32", "bf16")
    one_of("model.attention", recipe.model.attention, "sdpa", "flex_attention")
    one_of("schedule.kind", recipe.schedule.kind, "cosine", "wsd", "constant")
    one_of("stability.on_spike", recipe.stability.on_spike, "flag", "roll_back")
    one_of("schedule.gates", recipe.schedule.gates, "same", "constant")
    for key, value in (("optimizer.beta1", recipe.optimizer.beta1), ("optimizer.beta2", recipe.optimizer.beta2)):
        if not 0 <= value < 1:
            raise UserError(f"{key}={value} must be at least 0 and below 1")
    if not 0 <= recipe.schedule.final_ratio <= 1:
        raise UserError(f"schedule.final_ratio={recipe.schedule.final_ratio} must be between 0 and 1")
    if recipe.name in ("", ".", "..") or "/" in recipe.name:
        raise UserError(f"name={recipe.name!r} must be the name of one folder: put the path in output=")
    for key, value in (
        ("steps", recipe.steps),
        ("log_every", recipe.log_every),
        ("batch.micro_rows", recipe.batch.micro_rows),
        ("validation.rows", recipe.validation.rows),
        ("checkpoint.every", recipe.checkpoint.every),
        ("checkpoint.keep_last", recipe.checkpoint.keep_last),
        ("stability.max_consecutive_skips", recipe.stability.max_consecutive_skips),
        ("stability.spike_batches", recipe.stability.spike_batches),
        ("plan.gpus", recipe.plan.gpus),
    ):
        at_least(key, value, 1)
    at_least("stability.spike_window", recipe.stability.spike_window, 2)  # one step has no deviation
    if recipe.stability.on_spike == "roll_back" and not recipe.stability.spike_sigmas:
        raise UserError(
            "stability.on_spike=roll_back, but with stability.spike_sigmas=0 nothing is a spike: give it a number of standard "
            "deviations, or stability.on_spike=flag"
        )
    if not 0 < recipe.timeout_minutes < 1e6:
        raise UserError(f"timeout_minutes={recipe.timeout_minutes} must be above 0 and below a million")
    for key, value in (
        ("optimizer.learning_rate", recipe.optimizer.learning_rate),
        ("optimizer.gate_learning_rate", recipe.optimizer.gate_learning_rate),
        ("optimizer.eps", recipe.optimizer.eps),
        ("optimizer.weight_decay", recipe.optimizer.weight_decay),
        ("optimizer.gradient_clipping", recipe.optimizer.gradient_clipping),
        ("schedule.warmup_steps", recipe.schedule.warmup_steps),
        ("schedule.decay_steps", recipe.schedule.decay_steps),
        ("validation.every", recipe.validation.every),
        ("checkpoint.keep_every", recipe.checkpoint.keep_every),
        ("stability.max_rollbacks", recipe.stability.max_rollbacks),
        ("stability.spike_sigmas", recipe.stability.spike_sigmas),
        ("data.workers", recipe.data.workers),
        ("data.seed", recipe.data.seed),
        ("seed", recipe.seed),
    ):
        at_least(key, value, 0)
    for key, value in (("seed", recipe.seed), ("data.seed", recipe.data.seed)):
        if value >= 2**31:  # with epochs and ranks added, NumPy has to take it
            raise UserError(f"{key}={value} must be below {2**31}")
    for key, value in (("batch.rows", recipe.batch.rows), ("batch.tokens", recipe.batch.tokens)):
        if value is not None:
            at_least(key, value, 1)
    if recipe.plan.sequence_length is not None:
        at_least("plan.sequence_length", recipe.plan.sequence_length, 1)
    if recipe.plan.memory is not None and not 0 < recipe.plan.memory < math.inf:
        raise UserError(f"plan.memory={recipe.plan.memory} must be a number of GiB above 0")
    if not 0 < recipe.plan.mfu <= 1:
        raise UserError(f"plan.mfu={recipe.plan.mfu} must be above 0 and at most 1")
    block = recipe.model.segments_per_block
    if isinstance(block, str) and block != "auto":
        raise UserError(
            f"model.segments_per_block={block!r} is not a number of segments, auto, or null for all at once"
        )
    if isinstance(block, int):
        at_least("model.segments_per_block", block, 1)
    if (recipe.batch.tokens is None) == (recipe.batch.rows is None):
        raise UserError(
            f"batch.tokens={recipe.batch.tokens} and batch.rows={recipe.batch.rows}: give exactly one of the two "
            "(the other is null)"
        )
    if recipe.schedule.kind == "wsd" and recipe.schedule.decay_steps < 1:
        raise UserError("schedule.kind=wsd needs schedule.decay_steps of at least 1")
    if recipe.schedule.warmup_steps + recipe.schedule.decay_steps > recipe.steps:
        raise UserError(
            f"schedule.warmup_steps={recipe.schedule.warmup_steps} and schedule.decay_steps="
            f"{recipe.schedule.decay_steps} are more than steps={recipe.steps}: shorten them"
        )
    if recipe.checkpoint.keep_best and (
        not recipe.validation.every or recipe.checkpoint.every % recipe.validation.every
    ):
        raise UserError(
            f"checkpoint.keep_best=true needs a validation at each checkpoint: make checkpoint.every="
            f"{recipe.checkpoint.every} a multiple of validation.every={recipe.validation.every}"
        )
    check_data(recipe.data)
    if recipe.deepspeed != "auto" and not Path(recipe.deepspeed).is_file():
        raise UserError(f"deepspeed={recipe.deepspeed} is no file: give a DeepSpeed JSON file, or auto")


def check_data(data: DataRecipe) -> None:
    if data.cache_limit is not None:
        try:
            byte_count(data.cache_limit)
        except UserError as error:
            raise UserError(f"data.cache_limit={error}") from error
    if data.streams and data.path != DataRecipe.path:
        raise UserError(f"data.path={data.path} and data.streams are both given: name the folder among the streams")
    for number, stream in enumerate(data.streams):
        key = f"data.streams[{number}]"
        if not stream.path:
            raise UserError(f"{key} has no path: give it a folder that data_prep made, or an address")
        if stream.proportion is not None and stream.repeat is not None:
            raise UserError(f"{key} has a proportion and a repeat: give one of them")
        if (stream.proportion is None) != (data.streams[0].proportion is None):
            raise UserError(f"{key}.proportion={stream.proportion}: give every stream a proportion, or none")
        for what in ("proportion", "repeat"):
            value = getattr(stream, what)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{key}.{what}={value} must be above 0: leave the stream out if nothing is to be taken")
