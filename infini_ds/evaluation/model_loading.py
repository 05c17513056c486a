"""Load the model to evaluate: an exported folder, a run, a checkpoint, or an external causal model of Hugging Face."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from infini_ds.conversion.locate import kind_of, load_model, load_tokenizer, locate
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.model.cache_file import hash_weights
from infini_ds.utils.errors import UserError, first_line
from infini_ds.utils.pretrained import load_pretrained, load_tokenizer_files

# Fields of a configuration that do not change what the model computes. They differ between a checkpoint and its export.
NOT_HASHED = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "n_positions", "torch_dtype", "transformers_version"),
    "use_cache",
)


@dataclass(frozen=True)
class ModelFacts:
    """What evaluation.json records of the model."""

    path: str
    sha256: str
    parameters: int
    model_type: str


@dataclass(frozen=True)
class EvaluatedModel:
    """A model in evaluation mode, with its tokenizer.

    path: as the user gave it.
    run: the run that it belongs to, or None.
    results_folder: where its results are written unless the user names another folder.
    sha256: of its weights and configuration.
    """

    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    run: Path | None
    results_folder: Path
    sha256: str

    @cached_property
    def cache_key(self) -> str:
        """A hash of the model and its tokenizer, on which every result depends."""
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return hashlib.sha256(f"{self.sha256} {vocabulary}".encode()).hexdigest()

    @property
    def start_ids(self) -> list[int]:
        """The token that a text begins with: the start token, or the end token of a tokenizer without one."""
        of_start, of_end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [of_start if of_start is not None else of_end]

    @property
    def facts(self) -> ModelFacts:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return ModelFacts(self.path, self.sha256, parameters, self.model.config.model_type)


def load_evaluated_model(name: str, device: torch.device) -> EvaluatedModel:
    """Return the model in fp32 on `device`.

    Raises:
        UserError: no such model, in a folder or on the hub, or it has no tokenizer.
    """
    if not Path(name).is_dir() or kind_of(Path(name)) == "external":
        model, tokenizer = _load_external(name)
        run, folder = None, Path(name) if Path(name).is_dir() else Path("runs", name.replace("/", "--"))
        results_folder = folder / "evaluation"
    else:
        location = locate(name)
        model, tokenizer, run = load_model(location), load_tokenizer(location), location.run
        results_folder = (run or location.path) / "evaluation"
        if location.path == location.checkpoint:
            results_folder = results_folder / location.checkpoint.name
    return EvaluatedModel(name, model.eval().to(device), tokenizer, run, results_folder, model_sha256(model))


def _load_external(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if Path(name).is_dir():
        return load_pretrained(AutoModelForCausalLM, name, name), load_tokenizer_files(Path(name), name)
    try:
        return load_pretrained(AutoModelForCausalLM, name, name), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError, ValueError, KeyError, errors of the hub's client, depending on what is wrong
        if isinstance(error, UserError) and error.__cause__ is None:
            raise  # the model exists, and its weights are incomplete or not finite
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"{name}: no such folder, nor a model on the hub ({reason}): give an exported folder, a run, a checkpoint, "
            "or a causal language model of Hugging Face with its tokenizer"
        ) from error


def model_sha256(model: PreTrainedModel) -> str:
    """Return the SHA-256 of the weights, in the order of their names, and of the configuration without NOT_HASHED.

    A checkpoint and its export have the same.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_HASHED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    hash_weights(model, digest)
    return digest.hexdigest()


def has_memory(model: PreTrainedModel) -> TypeGuard[InfiniGPTNeoForCausalLM]:
    """Return whether the model has a compressive memory that can be switched off or swapped."""
    return isinstance(model, InfiniGPTNeoForCausalLM)
