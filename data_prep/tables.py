"""Rows of JSON lines and Parquet files. A file that is damaged is named in one sentence."""

import io
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from data_prep.documents import Document, ReadOptions, decode, decode_column
from infini_ds.utils.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow.parquet

# By the ending of a file's name, in small letters. An unknown ending: not compressed.
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4"}

Column = Callable[[str, dict[str, Any], ReadOptions], Document]


def compression_of(path: str) -> str | None:
    """Return pyarrow's name of the compression that the name of a file tells, or None."""
    return COMPRESSIONS.get(os.path.splitext(path)[1].lower())


def read_json_lines(path: str, options: ReadOptions, column: Column = decode_column) -> Iterator[Document]:
    """Yield the documents of a file of JSON objects, one a line; the name tells the compression.

    It is not read with `datasets`, which names neither the file nor the byte of what is broken, and fails if the type
    of an unused column changes.

    Args:
        column: returns the document of a row, given its name for errors.
    Raises:
        UserError: the file cannot be read, or a line is not a JSON object.
    """
    offset = 0
    for number, line in enumerate(_lines(path, options), 1):
        name = f"{path} line {number}"
        decoded = decode(name, line, options.bad_utf8, offset)
        offset += len(line)
        if decoded.text is None:
            yield decoded
        elif decoded.text.strip():
            document = column(name, _parse(name, decoded.text, options), options)
            yield document._replace(repaired=document.repaired or decoded.repaired)


def _lines(path: str, options: ReadOptions) -> Iterator[bytes]:
    import pyarrow

    compression = compression_of(path)
    if compression and os.path.isfile(path) and not os.path.getsize(path):
        raise options.error(f"{path} has 0 bytes, and no {compression} file has; fetch it again, or remove it")
    number = 0
    try:
        with io.BufferedReader(pyarrow.input_stream(path, compression=compression)) as lines:
            for line in lines:
                number += 1
                yield line
    except (OSError, pyarrow.ArrowException) as error:
        raise options.error(
            f"{path} cannot be read after line {number} ({first_line(error)}); fetch it again, or remove it"
        ) from error


def _parse(name: str, text: str, options: ReadOptions) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except RecursionError:
        raise options.error(f"{name} is nested too deeply; repair or remove it") from None
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise options.error(
                f"{name} begins a JSON array, and jsonl: takes one object a line; hf:FOLDER reads .json files of one "
                "array each"
            ) from None
        raise options.error(f"{name} is not JSON ({error.msg} at column {error.colno}); repair or remove it") from None
    except ValueError as error:  # a number of thousands of digits
        raise options.error(f"{name} cannot be read ({first_line(error)}); repair or remove it") from None
    if not isinstance(row, dict):
        raise options.error(f"{name} is a JSON {type(row).__name__}, not an object with columns")
    return row


def open_parquet(path: str, options: ReadOptions) -> "pyarrow.parquet.ParquetFile":
    """Open a Parquet file. Raises a UserError if it is not one."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise options.error(
            f"{path} is not a Parquet file ({first_line(error)}); fetch it again, or remove it"
        ) from error


def read_parquet_rows(path: str, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of a Parquet file. Only the text column is read, as bytes, so that --bad-utf8 applies.

    Raises:
        UserError: the file is damaged, or has no such column of text.
    """
    import pyarrow

    column = options.text_column
    file = open_parquet(path, options)
    if column not in file.schema_arrow.names:
        raise UserError(
            f"--text-column {column}: {path} has no such column; it has {', '.join(file.schema_arrow.names)}"
        )
    number = 0
    batches = file.iter_batches(batch_size=1024, columns=[column])
    while True:
        try:
            batch = next(batches, None)
        except (OSError, pyarrow.ArrowException) as error:
            raise options.error(
                f"{path} is damaged after row {number} ({first_line(error)}); fetch it again, or remove it"
            ) from error
        if batch is None:
            return
        try:
            texts = batch.column(batch.schema.names.index(column)).cast(pyarrow.large_binary())
        except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            kind = file.schema_arrow.field(column).type
            raise UserError(
                f"--text-column {column}: {path} holds {kind} there, not text; choose another column"
            ) from None
        for text in texts:
            yield decode(f"{path} row {number}", text.as_py() or b"", options.bad_utf8)
            number += 1
