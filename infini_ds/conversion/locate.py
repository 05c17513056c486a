"""What a path that a user gives holds: an exported folder, a run, or one checkpoint of a run; and loading each."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from infini_ds.checkpoint.manifest import MANIFEST, complete_checkpoints, find_damage
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError


@dataclass(frozen=True)
class Source:
    """`checkpoint` and `run` are None for an exported folder."""

    path: Path
    checkpoint: Path | None
    run: Path | None

    @property
    def tokenizer_folder(self) -> Path:
        return self.path if self.checkpoint is None else self.run / "tokenizer"


def locate(path: str | Path) -> Source:
    """
    Raises:
        UserError: the path holds none of the three, or a run without a finished checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; give an exported folder, a run, or a checkpoint")
    if (path / MANIFEST).is_file():
        run = path.resolve().parent.parent
        if not (run / "recipe.yaml").is_file():
            raise UserError(f"{path}: a checkpoint is read from inside its run, and {run} is none (no recipe.yaml)")
        return Source(path, path, run)
    if (path / "checkpoints").is_dir():
        good = complete_checkpoints(path)
        if not good:
            raise UserError(f"{path}: this run has no finished checkpoint yet")
        return Source(path, good[-1], path)
    if (path / "config.json").is_file():
        kind = json.loads((path / "config.json").read_text()).get("model_type")
        if kind != InfiniGPTNeoConfig.model_type:
            raise UserError(f"{path} is a {kind} model: give it a memory first, with launch/convert.py --from-gpt-neo")
        return Source(path, None, None)
    raise UserError(
        f"{path} is neither an exported folder (config.json), nor a run (checkpoints/), nor a finished checkpoint "
        f"({MANIFEST})"
    )


def load_model(source: Source) -> InfiniGPTNeoForCausalLM:
    """The model in fp32, ready for evaluation.

    Raises:
        UserError: the checkpoint is damaged.
    """
    disable_progress_bar()
    if source.checkpoint is None:
        return InfiniGPTNeoForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    if damaged := find_damage(source.checkpoint):
        raise UserError(
            f"{source.checkpoint} is damaged: {'; '.join(damaged)}; give another checkpoint of the run, which "
            f"python launch/checkpoint.py list {source.run} shows"
        )
    from infini_ds.conversion.zero import full_weights

    config = InfiniGPTNeoConfig.from_pretrained(source.checkpoint)
    model = InfiniGPTNeoForCausalLM(config)
    model.load_state_dict(full_weights(source.checkpoint))
    return model.eval()


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(source.tokenizer_folder)
