"""manifest.json: what a finished folder holds and how it was made. A folder without one is not finished."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from data_prep.shards import SplitCounts
from data_prep.splits import SkipCounts
from data_prep.tokenizer import TokenizerInfo
from infini_ds.utils.atomic import write_json_atomic
from infini_ds.utils.errors import UserError

FORMAT_VERSION = 1
NAME = "manifest.json"
PACKAGES = ("datasets", "mosaicml-streaming", "numpy", "pyarrow", "tokenizers", "transformers", "xxhash")


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        options: those that the result depends on, by name.
        token_dtype: of the token ids in the shards.
        created: UTC, ISO 8601.
        seconds: that the preparation took.
    """

    format_version: int
    options: dict[str, Any]
    sequence_length: int
    token_dtype: str
    tokenizer: TokenizerInfo
    train: SplitCounts
    validation: SplitCounts
    skipped: SkipCounts
    versions: dict[str, str]
    created: str
    seconds: float


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a preparation depends on."""
    return {"python": python_version()} | {name: version(name) for name in PACKAGES}


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write manifest.json."""
    write_json_atomic(folder / NAME, asdict(manifest), indent=2)


def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a finished folder. Raises a UserError if it is missing, damaged or of another format."""
    path = Path(folder, NAME)
    remedy = "make it with `python -m data_prep`"
    if not path.parent.is_dir():
        raise UserError(f"{folder}: no such folder of prepared data; {remedy}")
    if not path.is_file():
        raise UserError(f"{folder}: it holds no {NAME}, so it is not a finished folder of prepared data; {remedy}")
    try:
        fields = json.loads(path.read_text())
        if fields["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder}: its format is version {fields['format_version']} and this program's is {FORMAT_VERSION}; "
                f"{remedy} --force"
            )
        parts = {"tokenizer": TokenizerInfo, "train": SplitCounts, "validation": SplitCounts, "skipped": SkipCounts}
        return Manifest(**fields | {name: part(**fields[name]) for name, part in parts.items()})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: it is damaged ({error}); {remedy} --force") from error
