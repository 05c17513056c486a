"""Finds files of text: in folders, links included, by the ending of their names, and by globs."""

import glob
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from infini_ds.utils.errors import UserError

Refuse = Callable[[str], UserError]  # makes the error of a source from a sentence


def walk_files(root: Path, suffix: str, refuse: Refuse) -> Iterator[Path]:
    """Yield the files below `root` whose names end in `suffix`, in small or capital letters.

    Their order depends on names alone. Links to folders are followed; a folder that several paths lead to is entered
    once, so links may form a loop.

    Raises:
        UserError: a folder cannot be listed, or a file is a link to nothing or no regular file.
    """
    entered: set[str] = {os.path.realpath(root)}

    def stop(error: OSError) -> None:
        raise refuse(f"{error.filename} cannot be listed ({error.strerror}); give yourself the right to, or move it")

    for folder, folders, files in os.walk(root, onerror=stop, followlinks=True):
        folders.sort()
        for name in list(folders):
            real = os.path.realpath(os.path.join(folder, name))
            if real in entered:
                folders.remove(name)
            entered.add(real)
        for file in sorted(files):
            if file.lower().endswith(suffix):
                path = Path(folder, file)
                if not path.is_file():
                    raise refuse(f"{path} is a link to nothing or no regular file; remove it")
                yield path


def walk_library(root: Path, suffix: str, skip: Collection[str]) -> Iterator[Path]:
    """Yield the files below `root` whose names end in `suffix`, without following links or entering folders `skip`."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - set(skip))
        for file in sorted(files):
            if file.endswith(suffix):
                yield Path(folder, file)


def find_files(argument: str, refuse: Refuse) -> list[str]:
    """Return the files of a comma list of paths and globs, those of a glob sorted, each file once.

    Raises:
        UserError: one of them matches no file.
    """
    files: dict[str, str] = {}
    for pattern in argument.split(","):
        pattern = os.path.expanduser(pattern)
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not any(map(os.path.isfile, found)):
            if os.path.isdir(pattern):
                raise refuse(f"{pattern} is a folder; give its files, such as '{pattern.rstrip('/')}/*'")
            raise refuse(f"{pattern} matches no file; give files or a glob such as 'folder/*'")
        for path in filter(os.path.isfile, found):
            files.setdefault(os.path.realpath(path), path)
    return list(files.values())
