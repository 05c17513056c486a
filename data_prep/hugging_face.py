"""What `datasets` can load: names on the hub, and local folders of the same layout. Only the text column is read.

`datasets` casts every column to the types of the first file. A column that nobody asked for then ends a preparation, if
its values are of several types, or null in the first file. So JSON and Parquet files of a local folder are found by
`datasets`, which knows splits and subsets, and read by `tables.py`.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.documents import Document, ReadOptions, decode_column
from data_prep.files import walk_files
from data_prep.tables import compression_of, read_json_lines, read_parquet_rows
from infini_ds.utils.errors import UserError, first_line

if TYPE_CHECKING:
    from datasets import DatasetBuilder


def read_hugging_face(name: str, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of a split. Raises a UserError if `datasets` cannot load it, or a file is damaged."""
    name = os.path.expanduser(name)
    if not os.path.isdir(name):
        yield from _stream(name, name, options)
        return
    name = os.path.abspath(name)  # `datasets` takes "csv" for its own reader of CSV
    with _plain_folder(name, options) as folder:
        builder = _load(lambda datasets: datasets.load_dataset_builder(folder, options.subset), options)
        files = _own_files(builder, options)
        if files is None:
            yield from _stream(name, folder, options)
            return
        column = _NullWhereMissing()
        for file in files:
            path = str(Path(file).resolve())
            if builder.config.__class__.__name__ == "ParquetConfig":
                yield from read_parquet_rows(path, options)
            elif _is_json_array(path):
                yield from _read_json_array(path, options, column)
            else:
                yield from read_json_lines(path, options, column)
        column.check(options)


class _NullWhereMissing:
    """Takes a column that a row lacks as null, as `datasets` does, unless all rows lack it."""

    def __init__(self) -> None:
        self.found, self.first = False, ("", {"": None})

    def __call__(self, name: str, row: dict[str, Any], options: ReadOptions) -> Document:
        if options.text_column in row:
            self.found = True
        elif not self.found:
            self.first = self.first if self.first[0] else (name, row)
        return decode_column(name, {options.text_column: None} | row, options)

    def check(self, options: ReadOptions) -> None:
        """Raise a UserError if there were rows, and none had the column."""
        if not self.found and self.first[0]:
            decode_column(*self.first, options)


def _load(load: Any, options: ReadOptions) -> Any:
    import datasets

    try:
        return load(datasets)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # OSError, ValueError, errors of pyarrow and of the hub's client, depending on what is wrong
        raise options.error(
            f"`datasets` cannot load it with --split {options.split} --text-column {options.text_column} "
            f"({first_line(error)})"
        ) from error


def _stream(name: str, path: str, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents that `datasets` streams."""

    def start(datasets: Any) -> Any:
        rows = datasets.load_dataset(path, options.subset, split=options.split, streaming=True)
        return iter(rows)

    rows = _load(start, options)
    for number in itertools.count():
        row = _load(lambda _: next(rows, None), options)
        if row is None:
            return
        yield decode_column(f"{name} {options.split} row {number}", row, options)


def _own_files(builder: "DatasetBuilder", options: ReadOptions) -> list[str] | None:
    """Return the files of the split if `tables.py` reads them as `datasets` would, else None."""
    kind, config = type(builder).__module__.rpartition(".")[2], builder.config
    files = (config.data_files or {}).get(options.split)
    if not files or any("::" in str(file) or not os.path.isfile(file) for file in files):
        return None
    if kind == "parquet":
        return [str(file) for file in files]
    if kind == "json" and getattr(config, "field", None) is None:
        return [str(file) for file in files] if all(_is_json_array(f) or _has_json_lines(f) for f in files) else None
    return None


def _first_line(path: str) -> bytes:
    import pyarrow

    try:
        with pyarrow.input_stream(path, compression=compression_of(path)) as file:
            return file.read(1 << 20).lstrip(b"\xef\xbb\xbf \t\r\n").split(b"\n")[0]
    except OSError:
        return b"{}"  # read_json_lines then says what is wrong


def _is_json_array(path: str) -> bool:
    return _first_line(path).startswith(b"[")


def _has_json_lines(path: str) -> bool:
    line = _first_line(path)
    try:
        return not line or isinstance(json.loads(line), dict)
    except ValueError:
        return len(line) > 1 << 19 or line.rstrip().endswith(b"}")  # else an object over several lines


def _read_json_array(path: str, options: ReadOptions, column: _NullWhereMissing) -> Iterator[Document]:
    """Yield the documents of a file that is one JSON array of objects."""
    import pyarrow

    try:
        with pyarrow.input_stream(path, compression=compression_of(path)) as file:
            rows = json.loads(file.read().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise options.error(f"{path} is not JSON ({first_line(error)}); repair or remove it") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise options.error(f"{path} element {number} is a JSON {type(row).__name__}, not an object with columns")
        yield column(f"{path} element {number}", row, options)


@contextmanager
def _plain_folder(folder: str, options: ReadOptions) -> Iterator[str]:
    """Give the block a folder in which `datasets` finds all files.

    It skips folders that are links, and names whose ending is in capitals. If there are any, this is another folder,
    with a link to each file, whose ending is in small letters.
    """
    files = list(walk_files(Path(folder), "", options.error))
    plain = {os.path.join(at, name) for at, _, names in os.walk(folder) for name in names}
    if plain == {str(file) for file in files} and all(_lower_ending(file.name) == file.name for file in files):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="data_prep-") as links:
        # The same last part, since `datasets` may take it for the name of the data.
        mirror = Path(links, Path(folder).resolve().name)
        for file in files:
            link = mirror / file.relative_to(folder).parent / _lower_ending(file.name)
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.exists():
                raise options.error(f"{file} and {link.name} differ in capital letters alone; rename one of them")
            link.symlink_to(file.resolve())
        yield str(mirror)


def _lower_ending(name: str) -> str:
    """Return the name with its endings in small letters: a.JSONL.GZ -> a.jsonl.gz. README.md stays."""
    stem, ending = os.path.splitext(name)
    return (_lower_ending(stem) if compression_of(name) else stem) + ending.lower()
