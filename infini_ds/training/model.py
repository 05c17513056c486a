"""The model that a recipe describes."""

import difflib
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.manifest import Manifest
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.model.presets import preset_config
from infini_ds.training.footprint import SPARE, Sharding, Work, footprint, largest_block
from infini_ds.training.processes import Process
from infini_ds.training.recipe import Recipe
from infini_ds.training.throughput import memory_free

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def model_config(recipe: Recipe, manifest: Manifest | None) -> InfiniGPTNeoConfig:
    """The model's configuration: the preset, the recipe's overrides, the data's vocabulary.

    Without a manifest, since the data is not there yet, the vocabulary is the preset's or the folder's. For
    `segments_per_block: auto` see `fitting_block`; here it is None.

    Raises:
        ValueError: unknown preset or field, an impossible value, or fewer embeddings than the data has tokens.
    """
    chosen = recipe.model
    fields = ("segment_length", "memory_rule", "position_embedding", "gate_init")
    given = {name: getattr(chosen, name) for name in fields if getattr(chosen, name) is not None}
    schedule = {name: getattr(chosen, name) for name in ("checkpoint_layers", "offload_states", "truncate_blocks")}
    schedule["segments_per_block"] = None if chosen.segments_per_block == "auto" else chosen.segments_per_block
    if chosen.start_from is not None:
        check_start(Path(chosen.start_from))
        if chosen.config:
            raise ValueError(
                f"model.config.{next(iter(chosen.config))} is given, but the shape is that of model.start_from="
                f"{chosen.start_from}: leave out one of the two"
            )
        for key in ("gate_init", "position_embedding"):
            if getattr(chosen, key) is not None:
                raise ValueError(
                    f"model.{key}={getattr(chosen, key)} is decided by the weights of model.start_from="
                    f"{chosen.start_from}: leave it out"
                )
        config = InfiniGPTNeoConfig.from_pretrained(chosen.start_from, **given, **schedule)
    else:
        _check_fields(chosen.config)
        tokens = {}
        if manifest is not None:
            data = manifest.tokenizer
            tokens = {"vocab_size": data.vocab_size, "bos_token_id": data.start_id, "pad_token_id": data.pad_id}
            tokens["eos_token_id"] = data.start_id  # a document ends where the next one starts
        config = preset_config(chosen.preset, **(tokens | given | schedule | chosen.config))
    config._attn_implementation = chosen.attention
    if chosen.attention == "flex_attention" and config.attention_dropout:
        raise ValueError(
            f"model.attention=flex_attention knows no dropout, and the model has attention_dropout="
            f"{config.attention_dropout}: model.config.attention_dropout=0 or model.attention=sdpa"
        )
    if manifest is not None and config.vocab_size < manifest.tokenizer.vocab_size:
        raise ValueError(
            f"the model has {config.vocab_size} embeddings and the data have "
            f"{manifest.tokenizer.vocab_size} tokens: prepare the data with the model's own tokenizer (--tokenizer)"
        )
    return config


def _check_fields(given: dict) -> None:
    """Raise a ValueError for a field that there is not, or whose value is of another kind than the default."""
    defaults = InfiniGPTNeoConfig().to_dict()
    known = set(defaults) | {"attention_types"}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean model.config.{near[0]}?" if near else ": it is no field of GPT-Neo's configuration"
            raise ValueError(f"unknown key model.config.{key}{hint}")
        kind = type(defaults.get(key))
        if kind in KINDS and type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"model.config.{key}={value!r} must be {KINDS[kind]}, such as {defaults[key]}")


def check_start(folder: Path) -> None:
    """Raise a ValueError if the folder is no Infini-GPT-Neo."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.start_from={folder} is no folder with a config.json")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != InfiniGPTNeoConfig.model_type:
        raise ValueError(
            f"model.start_from={folder} is a {kind} model: give it a memory with launch/convert.py --from-gpt-neo"
        )


def check_vocabulary(recipe: Recipe, tokenizer: Path) -> None:
    """Raise a ValueError if tokens mean something else to model.start_from than in `tokenizer`, the data's folder."""
    if recipe.model.start_from is None or not Path(recipe.model.start_from, "tokenizer.json").is_file():
        return
    if _vocabulary(Path(recipe.model.start_from)) != _vocabulary(tokenizer):
        raise ValueError(
            f"model.start_from={recipe.model.start_from} and the data in {tokenizer.parent} have different tokenizers: "
            f"prepare the data with --tokenizer {recipe.model.start_from}"
        )


def _vocabulary(folder: Path) -> dict[str, int]:
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


def build_model(recipe: Recipe, config: InfiniGPTNeoConfig) -> InfiniGPTNeoForCausalLM:
    """The model with its first weights, the same on every rank: drawn from the recipe's seed, or read."""
    torch.manual_seed(recipe.seed)
    if recipe.model.start_from is not None:
        model = InfiniGPTNeoForCausalLM.from_pretrained(recipe.model.start_from, config=config, dtype=torch.float32)
    else:
        model = InfiniGPTNeoForCausalLM(config)
    if recipe.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if recipe.model.compile:
        model.compile_layers()
    return model


def fitting_block(work: Work, sharding: Sharding, process: Process) -> int:
    """`segments_per_block: auto`: the largest block that fits into the memory of every rank, the same on all of them.

    Raises:
        ValueError: a rank has no room even for blocks of one segment.
    """
    room = int(memory_free(process) * (1 - SPARE))
    fits = torch.tensor([largest_block(work, sharding, room) or 0, room], device=process.device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    segments, room = fits.tolist()
    if not segments:
        least = footprint(replace(work, segments_per_block=1), sharding).peak
        checkpointing = "" if work.checkpointing else ", set model.gradient_checkpointing=true"
        raise ValueError(
            f"model.segments_per_block=auto: even blocks of one segment need {least / 2**30:.1f} GiB, and a rank has "
            f"{room / 2**30:.1f} GiB: lower batch.micro_rows={work.rows}{checkpointing}, or ask launch/plan.py"
        )
    return segments
