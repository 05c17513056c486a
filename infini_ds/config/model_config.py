"""The model's configuration and block schedule, from the recipe and the data's tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.manifest import Manifest
from infini_ds.config.loader import show
from infini_ds.config.recipe import ModelSection, Recipe
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig
from infini_ds.model.presets import preset_config
from infini_ds.utils.errors import UserError, did_you_mean
from infini_ds.utils.pretrained import read_config, read_json

TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
# Keys of the model section that are fields of InfiniGPTNeoConfig; null leaves the default, or what start_from has.
CONFIG_KEYS = ("segment_length", "memory_rule", "position_embedding", "gate_init", "short_conv", "embed_conv")
CONVOLUTIONS = ("short_conv", "embed_conv")  # a start_from without one can be given one
FIXED_BY_WEIGHTS = ("gate_init", "position_embedding")  # of these, what start_from decides


def model_config(recipe: Recipe, manifest: Manifest | None) -> InfiniGPTNeoConfig:
    """Return the model's configuration: the preset or start_from, the recipe's overrides, the data's vocabulary.

    Args:
        manifest: of the prepared data; None keeps the vocabulary of the preset or start_from.
    Raises:
        UserError: unknown preset or field, a value that the configuration refuses, or fewer embeddings than tokens.
    """
    section = recipe.model
    overrides = {name: getattr(section, name) for name in CONFIG_KEYS if getattr(section, name) is not None}
    if section.start_from is not None:
        _check_start_from(section)
        config = _build(InfiniGPTNeoConfig.from_pretrained, section.start_from, **overrides)
    else:
        _check_fields(section.config)
        tokens = {}
        if manifest is not None:
            tokenizer = manifest.tokenizer
            tokens = {
                "vocab_size": tokenizer.vocab_size,
                "bos_token_id": tokenizer.start_id,
                "eos_token_id": tokenizer.start_id,  # a document ends where the next one starts
                "pad_token_id": tokenizer.pad_id,
            }
        config = _build(preset_config, section.preset, **(tokens | overrides | section.config))
    config._attn_implementation = section.attention
    if section.attention == "flex_attention" and config.attention_dropout:
        raise UserError(
            f"model.attention=flex_attention has no dropout, and the model has attention_dropout="
            f"{config.attention_dropout}: give model.config.attention_dropout=0.0 or model.attention=sdpa"
        )
    if manifest is not None and config.vocab_size < manifest.tokenizer.vocab_size:
        raise UserError(
            f"the model has {config.vocab_size} embeddings and the data has {manifest.tokenizer.vocab_size} tokens: "
            "prepare the data with the model's own tokenizer (--tokenizer)"
        )
    return config


def block_schedule(recipe: Recipe) -> BlockSchedule:
    """Return the recipe's block schedule; `segments_per_block: auto` is None until the memory estimate resolves it."""
    section = recipe.model
    return BlockSchedule(
        segments_per_block=None if section.segments_per_block == "auto" else section.segments_per_block,
        checkpoint_layers=section.checkpoint_layers,
        offload_states=section.offload_states,
        truncate_blocks=section.truncate_blocks,
    )


def check_vocabulary(recipe: Recipe, tokenizer: Path) -> None:
    """Raise a UserError if the folder `tokenizer`, the data's, has another vocabulary than model.start_from."""
    start_from = recipe.model.start_from
    if start_from is None or not Path(start_from, "tokenizer.json").is_file():
        return
    given = f"model.start_from={start_from}"
    if _vocabulary(Path(start_from), given) != _vocabulary(tokenizer, f"the data in {tokenizer.parent}"):
        raise UserError(
            f"model.start_from={start_from} and the data in {tokenizer.parent} have different tokenizers: prepare the "
            f"data with --tokenizer {start_from}"
        )


def _build(make: Callable[..., InfiniGPTNeoConfig], *args: str, **fields: Any) -> InfiniGPTNeoConfig:
    """Call `make`, with the ValueError of a field that is refused as a UserError that names the recipe's key."""
    try:
        return make(*args, **fields)
    except ValueError as error:
        field, equals, _ = str(error).partition("=")
        prefix = "model." if field in ModelSection.model_fields else "model.config." if field in fields else ""
        raise UserError(f"{prefix if equals else ''}{error}") from error


def _check_fields(given: dict[str, Any]) -> None:
    """Raise a UserError for an unknown field of the configuration, or a value of another type than the default."""
    defaults = InfiniGPTNeoConfig().to_dict()
    known = set(defaults) | {"attention_types"}
    for key, value in given.items():
        if key not in known:
            hint = did_you_mean(key, known, prefix="model.config.")
            hint = hint if "did you mean" in hint else ": it is not a field of GPT-Neo's configuration"
            raise UserError(f"unknown key model.config.{key}{hint}")
        kind = type(defaults.get(key))
        if kind in TYPE_NAMES and type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(
                f"model.config.{key}={show(value)} must be {TYPE_NAMES[kind]}, such as {show(defaults[key])}"
            )


def _check_start_from(section: ModelSection) -> None:
    """Raise a UserError if start_from is not an Infini-GPT-Neo, or keys are given that it decides."""
    folder = Path(section.start_from or "")
    if not (folder / "config.json").is_file():
        raise UserError(f"model.start_from={folder} is not a folder with a config.json: give an exported model")
    given = read_config(folder, f"model.start_from={folder}")
    kind = given.get("model_type")
    if kind != InfiniGPTNeoConfig.model_type:
        raise UserError(
            f"model.start_from={folder} is a {kind} model, which has no memory: convert it to Infini-GPT-Neo first"
        )
    if section.config:
        raise UserError(
            f"model.config.{next(iter(section.config))} is given, but model.start_from={folder} decides the model's "
            "shape: leave out one of the two"
        )
    for key in FIXED_BY_WEIGHTS:
        if getattr(section, key) is not None:
            raise UserError(
                f"model.{key}={getattr(section, key)} is decided by the weights of model.start_from={folder}: leave it "
                "out"
            )
    for key in CONVOLUTIONS:
        width, asked = given.get(key, 0), getattr(section, key)  # exports of earlier versions do not have the field
        if width and asked not in (None, width):
            raise UserError(
                f"model.{key}={asked} is decided by the weights of model.start_from={folder}, which have a convolution "
                f"of width {width}: leave it out"
            )


def _vocabulary(folder: Path, name: str) -> dict[str, int]:
    vocabulary: dict[str, int] = read_json(folder / "tokenizer.json", name)["model"]["vocab"]
    return vocabulary
