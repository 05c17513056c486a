"""The model that a recipe describes."""

import difflib
import json
from pathlib import Path

import torch

from data_prep.manifest import Manifest
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.model.presets import preset_config
from infini_ds.training.recipe import Recipe


def model_config(recipe: Recipe, manifest: Manifest) -> InfiniGPTNeoConfig:
    """The model's configuration: the preset, the recipe's overrides, the data's vocabulary.

    Raises:
        ValueError: unknown preset or field, an impossible value, or fewer embeddings than the data has tokens.
    """
    chosen = recipe.model
    fields = ("segment_length", "memory_rule", "position_embedding", "gate_init")
    given = {name: getattr(chosen, name) for name in fields if getattr(chosen, name) is not None}
    if chosen.start_from is not None:
        check_start(Path(chosen.start_from), Path(recipe.data.path))
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
        config = InfiniGPTNeoConfig.from_pretrained(chosen.start_from, **given)
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
        given["segments_per_block"] = chosen.segments_per_block
        config = preset_config(chosen.preset, **(tokens | given | chosen.config))
    if config.vocab_size < manifest.tokenizer.vocab_size:
        raise ValueError(
            f"the model has {config.vocab_size} embeddings and data.path={recipe.data.path} has "
            f"{manifest.tokenizer.vocab_size} tokens: prepare the data with the model's own tokenizer (--tokenizer)"
        )
    return config


def check_start(folder: Path, data: Path) -> None:
    """Raise a ValueError if the folder is no Infini-GPT-Neo, or its tokens mean something else than the data's."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.start_from={folder} is no folder with a config.json")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != InfiniGPTNeoConfig.model_type:
        raise ValueError(
            f"model.start_from={folder} is a {kind} model: give it a memory with launch/convert.py --from-gpt-neo"
        )
    if (folder / "tokenizer.json").is_file() and _vocabulary(folder) != _vocabulary(data / "tokenizer"):
        raise ValueError(
            f"model.start_from={folder} and data.path={data} have different tokenizers: prepare the data with "
            f"--tokenizer {folder}"
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
    return model
