"""The model's configuration as a recipe and its data determine it."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path

from data_prep.manifest import Manifest
from infini_ds.config.recipe import Recipe
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig
from infini_ds.model.presets import preset_config
from infini_ds.utils.errors import UserError

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def model_config(recipe: Recipe, manifest: Manifest | None) -> InfiniGPTNeoConfig:
    """The model's configuration: the preset, the recipe's overrides, the data's vocabulary.

    Without a manifest, since the data is not there yet, the vocabulary is the preset's or the folder's.

    Raises:
        UserError: unknown preset or field, an impossible value, or fewer embeddings than the data has tokens.
    """
    chosen = recipe.model
    fields = ("segment_length", "memory_rule", "position_embedding", "gate_init")
    given = {name: getattr(chosen, name) for name in fields if getattr(chosen, name) is not None}
    if chosen.start_from is not None:
        check_start(Path(chosen.start_from))
        if chosen.config:
            raise UserError(
                f"model.config.{next(iter(chosen.config))} is given, but the shape is that of model.start_from="
                f"{chosen.start_from}: leave out one of the two"
            )
        for key in ("gate_init", "position_embedding"):
            if getattr(chosen, key) is not None:
                raise UserError(
                    f"model.{key}={getattr(chosen, key)} is decided by the weights of model.start_from="
                    f"{chosen.start_from}: leave it out"
                )
        config = _checked(InfiniGPTNeoConfig.from_pretrained, chosen.start_from, **given)
    else:
        _check_fields(chosen.config)
        tokens = {}
        if manifest is not None:
            data = manifest.tokenizer
            tokens = {"vocab_size": data.vocab_size, "bos_token_id": data.start_id, "pad_token_id": data.pad_id}
            tokens["eos_token_id"] = data.start_id  # a document ends where the next one starts
        config = _checked(preset_config, chosen.preset, **(tokens | given | chosen.config))
    config._attn_implementation = chosen.attention
    if chosen.attention == "flex_attention" and config.attention_dropout:
        raise UserError(
            f"model.attention=flex_attention knows no dropout, and the model has attention_dropout="
            f"{config.attention_dropout}: model.config.attention_dropout=0 or model.attention=sdpa"
        )
    if manifest is not None and config.vocab_size < manifest.tokenizer.vocab_size:
        raise UserError(
            f"the model has {config.vocab_size} embeddings and the data have "
            f"{manifest.tokenizer.vocab_size} tokens: prepare the data with the model's own tokenizer (--tokenizer)"
        )
    return config


def block_schedule(recipe: Recipe) -> BlockSchedule:
    """Return the recipe's block schedule; `segments_per_block: auto` is None until the memory estimate resolves it.

    Raises:
        UserError: a value is out of range.
    """
    chosen = recipe.model
    try:
        return BlockSchedule(
            segments_per_block=None if isinstance(chosen.segments_per_block, str) else chosen.segments_per_block,
            checkpoint_layers=chosen.checkpoint_layers,
            offload_states=chosen.offload_states,
            truncate_blocks=chosen.truncate_blocks,
        )
    except ValueError as error:
        raise UserError(f"model.{error}") from error


def _checked(make: Callable[..., InfiniGPTNeoConfig], *args, **fields) -> InfiniGPTNeoConfig:
    try:
        return make(*args, **fields)
    except ValueError as error:  # the configuration refuses a field's value, and says so in a sentence
        raise UserError(str(error)) from error


def _check_fields(given: dict) -> None:
    """Raise a UserError for a field that there is not, or whose value is of another kind than the default."""
    defaults = InfiniGPTNeoConfig().to_dict()
    known = set(defaults) | {"attention_types"}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean model.config.{near[0]}?" if near else ": it is no field of GPT-Neo's configuration"
            raise UserError(f"unknown key model.config.{key}{hint}")
        kind = type(defaults.get(key))
        if kind in KINDS and type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"model.config.{key}={value!r} must be {KINDS[kind]}, such as {defaults[key]}")


def check_start(folder: Path) -> None:
    """Raise a UserError if the folder is no Infini-GPT-Neo."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model.start_from={folder} is no folder with a config.json")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != InfiniGPTNeoConfig.model_type:
        raise UserError(
            f"model.start_from={folder} is a {kind} model: give it a memory with launch/convert.py --from-gpt-neo"
        )


def check_vocabulary(recipe: Recipe, tokenizer: Path) -> None:
    """Raise a UserError if tokens mean something else to model.start_from than in `tokenizer`, the data's folder."""
    if recipe.model.start_from is None or not Path(recipe.model.start_from, "tokenizer.json").is_file():
        return
    if _vocabulary(Path(recipe.model.start_from)) != _vocabulary(tokenizer):
        raise UserError(
            f"model.start_from={recipe.model.start_from} and the data in {tokenizer.parent} have different tokenizers: "
            f"prepare the data with --tokenizer {recipe.model.start_from}"
        )


def _vocabulary(folder: Path) -> dict[str, int]:
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
