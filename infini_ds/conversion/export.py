"""A Hugging Face folder that needs nothing of this project: weights, configuration, model code, tokenizer, card."""

import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig

from infini_ds.checkpoint.manifest import MANIFEST
from infini_ds.conversion.card import model_card
from infini_ds.conversion.locate import Source, load_model
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError


def export(source: Source, out: Path, max_shard_size: str = "2GB", dtype: torch.dtype = torch.float32) -> None:
    """Write a run's newest checkpoint, or one checkpoint, as a Hugging Face folder.

    Args:
        max_shard_size: of one safetensors file, such as "500MB".
    Raises:
        UserError: the checkpoint cannot be read, or `out` holds something else.
    """
    write_folder(load_model(source).to(dtype), source.tokenizer_folder, out, model_card(source), max_shard_size)


def write_folder(
    model: InfiniGPTNeoForCausalLM, tokenizer: Path | None, out: Path, card: str, max_shard_size: str = "2GB"
) -> None:
    """Write all in a folder beside `out` and put it in place at the end, so that `out` is never half a model."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or _is_export(out))):
        raise UserError(f"--out {out} holds other files: choose another folder")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    InfiniGPTNeoConfig.register_for_auto_class()
    InfiniGPTNeoForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    config = model.config
    # `save_pretrained` adds the model's own class to these.
    config.auto_map = {"AutoModelForSequenceClassification": "modeling.InfiniGPTNeoForSequenceClassification"}
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
    config = folder / "config.json"
    if (folder / MANIFEST).exists() or (folder / ".git").exists():
        return False
    return config.is_file() and json.loads(config.read_text()).get("model_type") == InfiniGPTNeoConfig.model_type


def push_to_hub(folder: Path, name: str, private: bool) -> str:
    """Upload an exported folder to the Hugging Face hub; returns its address.

    Raises:
        UserError: the hub refused, or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"--push-to-hub {name}: the upload failed ({reason}); {folder} is complete, so `hf auth login` and "
            f"`hf upload {name} {folder}` can send it later"
        ) from error
    return str(address)
