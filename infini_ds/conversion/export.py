"""Write a Hugging Face folder that works without this project: weights, configuration, model code, tokenizer, card."""

import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig

from infini_ds.checkpoint.manifest import MANIFEST
from infini_ds.conversion.card import card_of_checkpoint
from infini_ds.conversion.locate import ModelLocation, load_model
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError, first_line


def export(location: ModelLocation, out: Path, max_shard_size: str = "2GB", dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        max_shard_size: upper limit of one safetensors file, such as "500MB".
    Raises:
        UserError: the model is already in Hugging Face format, the checkpoint is damaged, or `out` holds other files.
    """
    if location.checkpoint is None or location.run is None:
        raise UserError(f"{location.path} is already in Hugging Face format: give a run or a checkpoint")
    card = card_of_checkpoint(location.checkpoint, location.run)
    write_folder(load_model(location, dtype), location.tokenizer_folder, out, card, max_shard_size)


def write_folder(
    model: InfiniGPTNeoForCausalLM, tokenizer: Path | None, out: Path, card: str, max_shard_size: str = "2GB"
) -> None:
    """Write the files to `OUT.partial` and rename it, so that `out` is never incomplete.

    Args:
        tokenizer: the folder to copy the tokenizer from, or None to write none.
    Raises:
        UserError: `out` exists and is neither empty nor an earlier export.
    """
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or _is_export(out))):
        raise UserError(f"--out {out} holds other files: choose another folder")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    InfiniGPTNeoConfig.register_for_auto_class()
    InfiniGPTNeoForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    config = model.config
    # `save_pretrained` adds the configuration's and the model's own class to this map.
    config.auto_map = {
        "AutoModel": "modeling.InfiniGPTNeoModel",
        "AutoModelForSequenceClassification": "modeling.InfiniGPTNeoForSequenceClassification",
    }
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id if config.pad_token_id is not None else config.eos_token_id,
    )
    model.save_pretrained(partial, max_shard_size=max_shard_size)
    if tokenizer is not None:
        shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
    (partial / "README.md").write_text(card)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def _is_export(folder: Path) -> bool:
    if (folder / MANIFEST).exists() or (folder / ".git").exists():
        return False
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type") == InfiniGPTNeoConfig.model_type


def push_to_hub(folder: Path, name: str, private: bool) -> str:
    """Upload an exported folder to the Hugging Face hub and return its URL.

    Raises:
        UserError: the hub refuses the upload or cannot be reached. The folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # the hub's client raises errors of several libraries
        raise UserError(
            f"--push-to-hub {name}: the upload failed ({first_line(error)}); {folder} is complete, so `hf auth login` "
            f"and `hf upload {name} {folder}` can upload it later"
        ) from error
    return str(url)
