"""Atomic writes: a reader sees the earlier content of a file or the complete new one, also after a crash."""

import json
import os
import uuid
from pathlib import Path


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` through a partial file in the same folder, and fsync the file and the folder.

    The partial file has a name of its own (`NAME.*.partial`), so that several processes may write the same path. It is
    removed if the write fails.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_json_atomic(path: Path, obj: object, indent: int | None = 1) -> None:
    """Write `obj` to `path` as JSON, atomically. Raises TypeError, and writes nothing, if it has no JSON form."""
    write_text_atomic(path, json.dumps(obj, indent=indent) + "\n")


def fsync_dir(folder: Path) -> None:
    """Flush the names in `folder` to the disk, which fsync of a file in it does not do."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
