"""From a recipe to the parts that the loop needs: model, data, engine, and where the run goes on."""

import difflib
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from data_prep.manifest import load_manifest
from infini_ds.data.streams import TrainingStream, ValidationRows
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.model.presets import preset_config
from infini_ds.training import checkpoints
from infini_ds.training.checkpoints import TrainState
from infini_ds.training.deepspeed_config import deepspeed_config, default_file
from infini_ds.training.processes import Process
from infini_ds.training.recipe import BatchShape, Recipe, batch_shape

# What may differ between the recipe that began a run and the one that goes on with it.
MAY_CHANGE = {"steps", "resume", "log_every", "output", "name", "deepspeed", "validation", "checkpoint", "schedule"}


@dataclass
class Training:
    """All that the loop works on."""

    recipe: Recipe
    process: Process
    shape: BatchShape
    precision: str
    sequence_length: int
    engine: object
    stream: TrainingStream
    validation: ValidationRows
    state: TrainState
    resumed_from: Path | None

    @property
    def model(self) -> InfiniGPTNeoForCausalLM:
        return self.engine.module


def choose_precision(asked: str, device: torch.device) -> str:
    """bf16 on a GPU that has it, else fp32; bf16 without native instructions is hundreds of times slower than fp32."""
    if asked != "auto":
        return asked
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def model_config(recipe: Recipe, manifest) -> InfiniGPTNeoConfig:
    """The model's configuration: the preset, the recipe's overrides, the data's vocabulary.

    Raises:
        ValueError: unknown preset or field, an impossible value, or fewer embeddings than the data has tokens.
    """
    chosen = recipe.model
    if chosen.start_from is not None:
        if not (Path(chosen.start_from) / "config.json").is_file():
            raise ValueError(f"model.start_from={chosen.start_from} is no folder with a config.json")
        config = InfiniGPTNeoConfig.from_pretrained(chosen.start_from)
        config.segments_per_block = chosen.segments_per_block
    else:
        known = set(InfiniGPTNeoConfig().to_dict()) | {"attention_types"}
        for key in set(chosen.config) - known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean model.config.{near[0]}?" if near else ": it is no field of GPT-Neo's configuration"
            raise ValueError(f"unknown key model.config.{key}{hint}")
        data = manifest.tokenizer
        tokens = {"vocab_size": data.vocab_size, "bos_token_id": data.start_id, "pad_token_id": data.pad_id}
        tokens["eos_token_id"] = data.start_id  # a document ends where the next one starts
        fields = {
            name: getattr(chosen, name)
            for name in ("segment_length", "segments_per_block", "memory_rule", "position_embedding", "gate_init")
        }
        config = preset_config(chosen.preset, **(tokens | fields | chosen.config))
    if config.vocab_size < manifest.tokenizer.vocab_size:
        raise ValueError(
            f"the model has {config.vocab_size} embeddings and data.path={recipe.data.path} has "
            f"{manifest.tokenizer.vocab_size} tokens: prepare the data with the model's own tokenizer (--tokenizer)"
        )
    return config


def build_model(recipe: Recipe, config: InfiniGPTNeoConfig) -> InfiniGPTNeoForCausalLM:
    seed_everything(recipe.seed)  # the same weights on every rank
    if recipe.model.start_from is not None:
        model = InfiniGPTNeoForCausalLM.from_pretrained(recipe.model.start_from, config=config, dtype=torch.float32)
    else:
        model = InfiniGPTNeoForCausalLM(config)
    if recipe.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def set_up(recipe: Recipe, process: Process) -> Training:
    """Check everything that can be wrong, then build; the processes are connected on the way.

    Raises:
        ValueError: the recipe does not fit the data, the ranks, or the run that it is to go on with.
    """
    manifest = load_manifest(recipe.data.path)
    shape = batch_shape(recipe.batch, manifest.sequence_length, process.world_size)
    precision = choose_precision(recipe.precision, process.device)
    file = default_file(process.device.type) if recipe.deepspeed == "auto" else Path(recipe.deepspeed)
    ds_config = deepspeed_config(file, recipe, shape, precision)
    config = model_config(recipe, manifest)
    good = checkpoints.good_checkpoints(recipe.folder)
    if good and not recipe.resume:
        raise ValueError(
            f"resume=false, but {recipe.folder} holds checkpoints: choose another name=, or remove that folder"
        )
    if good:
        check_same_run(recipe)

    from infini_ds.training.engine import build_engine, connect

    connect(process)
    if process.is_first:
        describe_run(recipe)
    stream = TrainingStream(Path(recipe.data.path), shape.rank_rows, recipe.data.seed, recipe.data.workers)
    validation = ValidationRows(Path(recipe.data.path))
    model = build_model(recipe, config)
    engine = build_engine(model, recipe, ds_config, process.device)
    seed_everything(recipe.seed + 1 + process.rank)  # dropout differs between ranks
    state = TrainState()
    if good:
        state, data_state = checkpoints.load(engine, good[-1])
        stream.load_state_dict(data_state)
    sequence_length, resumed_from = manifest.sequence_length, good[-1] if good else None
    return Training(recipe, process, shape, precision, sequence_length, engine, stream, validation, state, resumed_from)


def is_finished(recipe: Recipe) -> bool:
    """Whether the run has already made all of its steps."""
    good = checkpoints.good_checkpoints(recipe.folder)
    if not recipe.resume or not good:
        return False
    check_same_run(recipe)
    return checkpoints.read_mark(good[-1])["step"] >= recipe.steps


def check_same_run(recipe: Recipe) -> None:
    """Raise a ValueError if the run's folder was begun with a recipe that makes other numbers."""
    begun = _flatten(OmegaConf.to_container(OmegaConf.load(recipe.folder / "recipe.yaml")))
    for key, value in _flatten(asdict(recipe)).items():
        before = begun.get(key, value)
        if key.split(".")[0] not in MAY_CHANGE and value != before:
            raise ValueError(
                f"{key}={value}, but the run in {recipe.folder} was begun with {key}={before}: choose another name=, "
                f"or give {key}={before} to go on with it"
            )


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def describe_run(recipe: Recipe) -> None:
    """Write into the run's folder what it is: its recipe, and the data's tokenizer and manifest."""
    recipe.folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(recipe), recipe.folder / "recipe.yaml")
    data = Path(recipe.data.path)
    shutil.copy(data / "manifest.json", recipe.folder / "data_manifest.json")
    shutil.copytree(data / "tokenizer", recipe.folder / "tokenizer", dirs_exist_ok=True)
