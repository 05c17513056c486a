"""Find and load the model that a path holds: an exported folder, a run, or one checkpoint of a run."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from infini_ds.checkpoint.manifest import MANIFEST, complete_checkpoints, find_damage
from infini_ds.config.recipe import RECIPE_FILE
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError
from infini_ds.utils.paths import user_path
from infini_ds.utils.pretrained import check_finite, load_pretrained, load_tokenizer_files, read_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelLocation:
    """Where a model's files are.

    path: as the user gave it.
    checkpoint: the checkpoint to read, or None for an exported folder.
    run: the run that the checkpoint belongs to, or None for an exported folder.
    """

    path: Path
    checkpoint: Path | None
    run: Path | None

    @property
    def tokenizer_folder(self) -> Path:
        return self.path if self.run is None else self.run / "tokenizer"


def kind_of(path: Path) -> Literal["checkpoint", "run", "export", "external", None]:
    """Return what a folder holds; "external" is a model that this project has neither trained nor converted."""
    if (path / MANIFEST).is_file():
        return "checkpoint"
    if (path / "checkpoints").is_dir():
        return "run"
    if not (path / "config.json").is_file():
        return None
    own = read_config(path, str(path)).get("model_type") == InfiniGPTNeoConfig.model_type
    return "export" if own else "external"


def locate(path: str | Path) -> ModelLocation:
    """Return the location of an exported folder, of a run's newest complete checkpoint, or of one checkpoint.

    Raises:
        UserError: the path is not one of the three, or a run without a complete checkpoint.
    """
    path = user_path(str(path))
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give an exported folder, a run, or a checkpoint")
    kind = kind_of(path)
    if kind == "checkpoint":
        run = path.resolve().parent.parent
        if not (run / RECIPE_FILE).is_file():
            raise UserError(
                f"{path}: a checkpoint is read from inside its run, and {run} is not a run (it has no {RECIPE_FILE})"
            )
        return ModelLocation(path, path, run)
    if kind == "run":
        complete = complete_checkpoints(path)
        if not complete:
            raise UserError(f"{path}: this run has no complete checkpoint yet")
        return ModelLocation(path, complete[-1], path)
    if kind == "export":
        return ModelLocation(path, None, None)
    if kind == "external":
        model_type = read_config(path, str(path)).get("model_type")
        raise UserError(f"{path} is a {model_type} model: convert it first, with --from-gpt-neo {path}")
    raise UserError(
        f"{path} is neither an exported folder (config.json), nor a run (checkpoints/), nor a complete checkpoint "
        f"({MANIFEST})"
    )


def newest_run(runs: Path = Path("runs")) -> Path:
    """Return the run of a folder of runs that has saved a checkpoint last, and log which it is.

    Raises:
        UserError: the folder holds no run with a complete checkpoint.
    """
    checkpoints = {run.parent: complete_checkpoints(run.parent) for run in runs.glob(f"*/{RECIPE_FILE}")}
    saved = {run: (found[-1] / MANIFEST).stat().st_mtime for run, found in checkpoints.items() if found}
    if not saved:
        raise UserError(
            f"no model is named, and {runs}/ holds no run with a complete checkpoint: name a model, or train one with "
            "`make pretrain`"
        )
    newest = max(saved, key=lambda run: saved[run])
    logger.info(f"taking the newest run, {newest}")
    return newest


def load_model(
    location: ModelLocation, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> InfiniGPTNeoForCausalLM:
    """Return the model in evaluation mode.

    Raises:
        UserError: the checkpoint is damaged, the export's weights are damaged or incomplete, or a weight is not finite.
    """
    disable_progress_bar()
    if location.checkpoint is None:
        model = load_pretrained(InfiniGPTNeoForCausalLM, location.path, str(location.path))
    else:
        if damage := find_damage(location.checkpoint):
            raise UserError(
                f"{location.checkpoint} is damaged: {'; '.join(damage)}; give another checkpoint of {location.run}"
            )
        from infini_ds.conversion.zero import full_weights  # imports DeepSpeed, which an exported folder does not need

        model = InfiniGPTNeoForCausalLM(InfiniGPTNeoConfig.from_pretrained(location.checkpoint))
        model.load_state_dict(full_weights(location.checkpoint))
        check_finite(model, str(location.checkpoint))
    return model.eval().to(device=device, dtype=dtype)


def load_tokenizer(location: ModelLocation) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the model was trained with.

    Raises:
        UserError: its files are missing or damaged.
    """
    return load_tokenizer_files(location.tokenizer_folder, str(location.path), ["tokenizer_config.json"])
