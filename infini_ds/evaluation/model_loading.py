"""The model that is evaluated: an exported folder, a run, a checkpoint, or any causal model of Hugging Face."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from infini_ds.checkpoint.manifest import MANIFEST
from infini_ds.conversion.locate import load_model, load_tokenizer, locate
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError

# Of a configuration: what does not change what the model computes, and differs between a checkpoint and its export.
NOT_THE_MODEL = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
)


@dataclass(frozen=True)
class EvaluatedModel:
    """path: as the user gave it. run: the run that it belongs to, if any. sha256: of weights and configuration."""

    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    run: Path | None
    folder: Path
    sha256: str

    def identity(self) -> str:
        """Of the model and its tokenizer."""
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return hashlib.sha256(f"{self.sha256} {vocabulary}".encode()).hexdigest()

    def facts(self) -> dict:
        return {
            "path": self.path,
            "sha256": self.sha256,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "model_type": self.model.config.model_type,
        }


def load(name: str, device: torch.device) -> EvaluatedModel:
    """The model in fp32 on `device`; `folder` is where its results belong.

    Raises:
        UserError: there is no such model, here or on the hub, or it has no tokenizer.
    """
    if _is_foreign(name):
        model, tokenizer = _load_foreign(name)
        run, folder = None, Path(name) if Path(name).is_dir() else Path("runs", name.replace("/", "--"))
        folder = folder / "evaluation"
    else:
        source = locate(name)
        model, tokenizer, run = load_model(source), load_tokenizer(source), source.run
        folder = (run or source.path) / "evaluation"
        if source.path == source.checkpoint:
            folder = folder / source.checkpoint.name
    return EvaluatedModel(name, model.eval().to(device), tokenizer, run, folder, model_sha256(model))


def _is_foreign(name: str) -> bool:
    path = Path(name)
    if not path.is_dir():
        return True
    config = path / "config.json"
    if (path / MANIFEST).is_file() or (path / "checkpoints").is_dir() or not config.is_file():
        return False
    return json.loads(config.read_text()).get("model_type") != InfiniGPTNeoConfig.model_type


def _load_foreign(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError, ValueError, KeyError, errors of the hub's client: by what is wrong
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        where = "its files cannot be loaded" if Path(name).is_dir() else "there is no such folder, nor on the hub"
        raise UserError(
            f"{name}: {where} ({reason}): give an exported folder, a run, a checkpoint, or a causal language model of "
            "Hugging Face with its tokenizer"
        ) from error


def model_sha256(model: PreTrainedModel) -> str:
    """Of the weights, one by one in the order of their names, and the configuration as far as it shapes the result: a
    checkpoint and its export have the same."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def has_memory(model: PreTrainedModel) -> bool:
    return isinstance(model, InfiniGPTNeoForCausalLM)
