"""Paths as the user gives them, and paths that libraries cannot use."""

import errno
import os
import sys
from pathlib import Path

from infini_ds.utils.errors import UserError


def user_path(text: str) -> Path:
    """Return a path, with "~" at its start for the user's home. A shell leaves it in `--out=~/folder`."""
    return Path(os.path.expanduser(text))


def make_output_folder(folder: Path) -> None:
    """Create the folder that --out names.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}): give another folder") from error


def can_compile_cpp() -> bool:
    """Return whether PyTorch can compile C++ where it is installed: torch 2.13 does not quote its own path."""
    return not any(map(str.isspace, str(_folder_of_torch())))


def check_can_compile_cpp(option: str) -> None:
    """Raise a UserError that names `option` if PyTorch cannot compile C++ where it is installed."""
    if not can_compile_cpp():
        raise UserError(
            f"{option} compiles C++, and PyTorch's commands for that break at the space in {_folder_of_torch()}: use "
            f"an environment in a folder without one, or a link: ln -s '{sys.prefix}' ~/venv, then ~/venv/bin/python"
        )


def _folder_of_torch() -> Path:
    import torch  # takes a second

    return Path(torch.__file__).parent
