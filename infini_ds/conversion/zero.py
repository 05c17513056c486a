"""Consolidate the weights of a ZeRO checkpoint. DeepSpeed's conversion is imported in this file only."""

import contextlib
import io
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint


def full_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return all weights in fp32, from the master copies that are split across the ranks' optimizer states.

    The caller has compared the files with the checkpoint's manifest, so an error while reading them is not the user's.
    """
    # DeepSpeed prints its progress to both streams.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
