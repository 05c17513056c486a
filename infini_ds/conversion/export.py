"""Write a Hugging Face folder that works without this project: weights, configuration, model code, tokenizer, card."""

import shutil
import stat
from pathlib import Path

import torch
from transformers import GenerationConfig

from infini_ds.conversion.card import card_of_checkpoint
from infini_ds.conversion.locate import ModelLocation, kind_of, load_model, load_tokenizer
from infini_ds.conversion.model_code import write_code
from infini_ds.conversion.sharpen import sharpen_memory
from infini_ds.conversion.tokenizer_settings import write_tokenizer_settings
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError, first_line

# Tools take `n_positions`, or else `max_position_embeddings`, for the longest text; the latter is the size of the table
# of positions, of which each segment begins with the first one.
LONGEST_TEXT = 1_000_000_000


def export(
    location: ModelLocation,
    out: Path,
    max_shard_size: str = "2GB",
    dtype: torch.dtype = torch.float32,
    sharpen: float | None = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        max_shard_size: upper limit of one safetensors file, such as "500MB".
        sharpen: multiply the scales of the memory's softmax features by it.
    Raises:
        UserError: the model is already in Hugging Face format, the checkpoint is damaged, its memory cannot be
            sharpened, or `out` holds other files.
    """
    if location.checkpoint is None or location.run is None:
        raise UserError(f"{location.path} is already in Hugging Face format: give a run or a checkpoint")
    load_tokenizer(location)  # before anything is written
    card = card_of_checkpoint(location.checkpoint, location.run, out.name, sharpen)
    model = load_model(location, dtype)
    if sharpen is not None:
        sharpen_memory(model, sharpen)
    write_folder(model, location.tokenizer_folder, out, card, max_shard_size)


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
    partial.mkdir(parents=True)
    config = model.config
    config.auto_map = write_code(partial)
    config.n_positions = LONGEST_TEXT
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id if config.pad_token_id is not None else config.eos_token_id,
    )
    model.save_pretrained(partial, max_shard_size=max_shard_size)
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
        write_tokenizer_settings(partial, config)
    (partial / "README.md").write_text(card, encoding="utf-8")
    _share_permissions(partial)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def _share_permissions(folder: Path) -> None:
    """Give all files the permissions of the card, which the umask decides: safetensors lets the owner alone read."""
    mode = stat.S_IMODE((folder / "README.md").stat().st_mode)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _is_export(folder: Path) -> bool:
    try:
        return kind_of(folder) == "export" and not (folder / ".git").exists()
    except UserError:  # a broken config.json, whose folder is not replaced
        return False


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
