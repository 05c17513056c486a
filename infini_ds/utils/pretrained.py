"""Load a Hugging Face folder's configuration, weights and tokenizer, or name what is wrong in one sentence."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError, first_line

# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "vocab.json")
LFS_POINTER = b"version https://git-lfs"
# Added to every name by DataParallel and DistributedDataParallel, and by torch.compile.
WRAPPER_PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")
EMBEDDING, OUTPUT_LAYER = "transformer.wte.weight", "lm_head.weight"  # one tensor, in the models that tie them
CLASSIFIER = re.compile(r"^score\.")  # a classifier's own layer, which a language model does not need


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return config.json of a folder.

    Args:
        name: what the user gave, for the sentence.
    Raises:
        UserError: it is not a JSON object.
    """
    return read_json(folder / "config.json", name)


def read_json(file: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file, or raise a UserError that names the file."""
    _reject_pointer(file, name)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {file} is damaged ({first_line(error)}): copy it again") from error
    return content


def load_pretrained(
    cls: type[Any], path: str | Path, name: str, config: PretrainedConfig | None = None, may_lack: str | None = None
) -> Any:
    """Return the model of a folder or hub name in fp32, with all its weights.

    Names that begin with `module.` or `_orig_mod.` are taken without it.

    Args:
        cls: a model class, or an auto class, whose `from_pretrained` is called.
        name: what the user gave, an option with its value or a folder, for the sentence.
        config: in place of the folder's own.
        may_lack: pattern of the tensors that the weights may lack, or have although the model has not.
    Raises:
        UserError: a file is missing, truncated or not what its name says; a tensor is missing, has another shape, or
            is not finite; the model does not have it.
    """
    state_dict = _renamed(Path(path), name, cls is InfiniGPTNeoForCausalLM) if Path(path).is_dir() else None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers warns of what is refused below
    logging.disable_progress_bar()
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        if state_dict is None:
            model, info = cls.from_pretrained(path, **options, **({} if config is None else {"config": config}))
        else:
            config = AutoConfig.from_pretrained(path) if config is None else config
            model, info = cls.from_pretrained(None, config=config, state_dict=state_dict, **options)
            if Path(path, "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(path)
    except Exception as error:  # OSError, ValueError, KeyError, errors of the hub's client, depending on what is wrong
        raise UserError(f"{name}: the model cannot be loaded ({first_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)
    _check_names(model, info, name, may_lack)
    check_finite(model, name)
    return model


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Raise a UserError that lists the weights that hold NaN or infinity."""
    bad = [each for each, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if bad:
        raise UserError(
            f"{name}: the weights hold NaN or infinity in {_listed(bad)}: they were saved so; give an earlier "
            "checkpoint, or save them again"
        )


def check_weight_files(folder: Path, name: str) -> dict[str, Path]:
    """Return the file of each tensor in a folder. Reads the headers of safetensors files, and names of others.

    Raises:
        UserError: a file is missing, truncated, a git-LFS pointer, or lacks tensors that the index lists.
    """
    found = next((folder / each for each in WEIGHT_FILES if (folder / each).exists()), None)
    if found is None:
        raise UserError(f"{name} holds no weights: {folder} has neither {' nor '.join(WEIGHT_FILES[::2])}")
    if found.suffix != ".json":
        return dict.fromkeys(_tensor_names(found, name), found)
    weight_map = read_json(found, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{name}: {found} has no weight_map: copy the file again")
    shards = {shard: folder / shard for shard in sorted(set(weight_map.values()))}
    if missing := [shard for shard, file in shards.items() if not file.exists()]:
        raise UserError(f"{name}: {_listed(missing)} of {found} is missing in {folder}: copy it again")
    files: dict[str, Path] = {}
    for shard, file in shards.items():
        held = _tensor_names(file, name)
        if lacking := [each for each, its_shard in weight_map.items() if its_shard == shard and each not in held]:
            raise UserError(f"{name}: {file} lacks {_listed(lacking)}, which {found.name} lists: copy both again")
        files |= dict.fromkeys(held, file)
    return files


def load_tokenizer_files(folder: Path, name: str, required: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder, which has to have the files `required`.

    Raises:
        UserError: a file is missing, or is not what its name says.
    """
    if missing := [file for file in required if not (folder / file).exists()]:
        raise UserError(f"{name}: {folder} holds no {_listed(missing)}, so no tokenizer: copy the tokenizer's files")
    for file in (folder / each for each in TOKENIZER_FILES):
        if file.exists():
            read_json(file, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of several libraries, depending on what is wrong
        reason = "" if (folder / "tokenizer.json").exists() else "tokenizer.json is missing: "
        raise UserError(
            f"{name}: the tokenizer in {folder} cannot be loaded ({reason}{first_line(error)}): copy its files again"
        ) from error
    return tokenizer


def _renamed(folder: Path, name: str, tied: bool) -> dict[str, Tensor] | None:
    """Return a folder's tensors under the names that the model has, or None if the files have these names."""
    files = check_weight_files(folder, name)
    names = {each: WRAPPER_PREFIX.sub("", each) for each in files}
    if tied and EMBEDDING not in names.values():
        names = {each: EMBEDDING if new == OUTPUT_LAYER else new for each, new in names.items()}
    elif tied and OUTPUT_LAYER in names.values():
        old = {new: each for each, new in names.items()}
        both = [_read_tensors(files[old[new]], [old[new]])[old[new]] for new in (EMBEDDING, OUTPUT_LAYER)]
        if not torch.equal(*both):
            raise UserError(
                f"{name}: {OUTPUT_LAYER} differs from {EMBEDDING}, and an Infini-GPT-Neo has one tensor for both: "
                "give a model whose embeddings are tied"
            )
    if all(each == new for each, new in names.items()):
        return None
    if len(set(names.values())) < len(names):
        raise UserError(f"{name}: the weights hold tensors twice, with and without a prefix such as `module.`")
    by_file: dict[Path, list[str]] = {}
    for each, file in files.items():
        by_file.setdefault(file, []).append(each)
    return {names[each]: t for file, held in by_file.items() for each, t in _read_tensors(file, held).items()}


def _check_names(model: PreTrainedModel, info: dict[str, Any], name: str, may_lack: str | None) -> None:
    allowed = re.compile(may_lack or r"(?!)")
    other_shape = sorted(each if isinstance(each, str) else each[0] for each in info["mismatched_keys"])
    if other_shape:
        raise UserError(
            f"{name}: {_listed(other_shape)} has another shape than its config.json says: copy weights and config.json "
            "from the same model"
        )
    tied = {OUTPUT_LAYER} if EMBEDDING in info["missing_keys"] else set()
    unset = {each for each, weight in model.named_parameters() if weight.is_meta}
    missing = sorted(each for each in {*info["missing_keys"], *unset} - tied if not allowed.search(each))
    if missing:
        raise UserError(
            f"{name}: the weights are incomplete (missing: {_listed(missing)}): copy or save the model again"
        )
    if isinstance(model, InfiniGPTNeoForCausalLM):
        unknown = sorted(x for x in info["unexpected_keys"] if not allowed.search(x) and not CLASSIFIER.search(x))
        if unknown:
            raise UserError(
                f"{name}: the weights hold {_listed(unknown)}, which the model of its config.json does not have: copy "
                "weights and config.json from the same model"
            )


def _tensor_names(file: Path, name: str) -> set[str]:
    """Return the names of a file's tensors, which shows that it is complete."""
    _reject_pointer(file, name)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return set(opened.keys())
        return set(torch.load(file, map_location="meta", weights_only=True))
    except Exception as error:  # torch.load raises errors of zipfile, pickle and torch
        raise UserError(f"{name}: {file} is truncated or damaged ({first_line(error)}): copy it again") from error


def _read_tensors(file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return {each: opened.get_tensor(each) for each in names}
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    return {each: tensors[each] for each in names}


def _reject_pointer(file: Path, name: str) -> None:
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LFS_POINTER))
    except OSError as error:
        raise UserError(f"{name}: {file} cannot be read ({first_line(error)})") from error
    if start == LFS_POINTER:
        raise UserError(
            f"{name}: {file} is a git-LFS pointer, not the file itself: run `git lfs pull` where it was cloned"
        )


def _listed(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
