"""The door to DeepSpeed's consolidation of ZeRO checkpoints."""

import contextlib
import io
import os
import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor

from infini_ds.utils.errors import UserError

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint


def full_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All weights in fp32, from the master copies that the ranks' optimizers hold.

    Raises:
        UserError: a file of the checkpoint is missing or damaged.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{checkpoint} cannot be read: {error}") from error
