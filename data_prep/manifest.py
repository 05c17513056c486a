"""manifest.json: what a finished folder holds and how it was made. A folder without one is not finished."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from data_prep.shards import SplitCounts
from data_prep.splits import Skipped
from data_prep.tokenizer import TokenizerFacts
from infini_ds.utils.errors import UserError

FORMAT_VERSION = 1
NAME = "manifest.json"
PACKAGES = ("datasets", "mosaicml-streaming", "numpy", "pyarrow", "tokenizers", "transformers", "xxhash")


@dataclass(frozen=True)
class Manifest:
    """options: those that shaped the result. token_dtype: of stored ids. created: UTC, ISO 8601. seconds: it took."""

    format_version: int
    options: dict[str, Any]
    sequence_length: int
    token_dtype: str
    tokenizer: TokenizerFacts
    train: SplitCounts
    validation: SplitCounts
    skipped: Skipped
    versions: dict[str, str]
    created: str
    seconds: float


def package_versions() -> dict[str, str]:
    return {"python": python_version()} | {name: version(name) for name in PACKAGES}


def save_manifest(manifest: Manifest, folder: Path) -> None:
    (folder / NAME).write_text(json.dumps(asdict(manifest), indent=2) + "\n")


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of a finished folder. A ValueError sentence if it is missing, unfinished or of another format."""
    path = Path(folder, NAME)
    remedy = "make it with `python -m data_prep`"
    if not path.parent.is_dir():
        raise UserError(f"{folder}: there is no such folder of prepared data; {remedy}")
    if not path.is_file():
        raise UserError(f"{folder}: it holds no {NAME}, so it is no finished folder of prepared data; {remedy}")
    try:
        fields = json.loads(path.read_text())
        if fields["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder}: its format is version {fields['format_version']} and this program's is {FORMAT_VERSION}; "
                f"{remedy} --force"
            )
        parts = {"tokenizer": TokenizerFacts, "train": SplitCounts, "validation": SplitCounts, "skipped": Skipped}
        return Manifest(**fields | {name: part(**fields[name]) for name, part in parts.items()})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: it is damaged ({error}); {remedy} --force") from error
