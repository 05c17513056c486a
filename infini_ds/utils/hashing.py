"""SHA-256 of files and of JSON values, as hexadecimal digits."""

import hashlib
import json
from pathlib import Path

CHUNK_BYTES = 1 << 22  # read at a time, so that a file of any size is hashed in bounded memory


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_json(obj: object) -> str:
    """Return the SHA-256 of a value's JSON form, in which the order of a mapping's keys has no effect."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()
