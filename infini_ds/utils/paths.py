"""Paths as the user gives them."""

import os
from pathlib import Path


def user_path(text: str) -> Path:
    """Return a path, with "~" at its start for the user's home. A shell leaves it in `--out=~/folder`."""
    return Path(os.path.expanduser(text))
