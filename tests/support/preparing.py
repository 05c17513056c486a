"""What tests of data_prep share: real texts, small options, and reading a source."""

import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from data_prep.documents import Document, ReadOptions
from data_prep.prepare import PrepareOptions, prepare
from data_prep.sources import read_documents
from infini_ds.utils.errors import UserError

TEXTS = [topics[name] for name in sorted(topics)[:60]]  # Python's help topics
SMALL = {"vocab_size": 400, "sequence_length": 128, "workers": 1, "validation_fraction": 0.2}


def read(source: str, **changes: Any) -> list[Document]:
    settings = {"text_column": "text", "split": "train", "subset": None, "bad_utf8": "error"}
    return list(read_documents(ReadOptions("--source", source, **settings | {"document_separator": None} | changes)))


def read_texts(source: str, **changes: Any) -> list[str | None]:
    return [document.text for document in read(source, **changes)]


def written_files(out: Path) -> dict[Path, bytes]:
    """Return what a run wrote, without its manifest and without what a reader expanded."""
    files = [file for file in out.rglob("*") if file.suffix in (".zstd", ".json") and file.name != "manifest.json"]
    return {file.relative_to(out): file.read_bytes() for file in files}


def assert_fails(words: list[str], **options: Any) -> None:
    """Check that `prepare` fails with one line that has all of `words`."""
    with pytest.raises(UserError) as error:
        prepare(PrepareOptions(**options), quiet=True)
    sentence = str(error.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "data_prep", *map(str, arguments)]
