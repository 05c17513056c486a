"""Where documents come from. To add a kind of source, write a generator of `Document` with `@source("kind:ARGUMENT")`.

Every reader is lazy and yields the same documents in the same order at each call: a corpus is read more than once, for
the tokenizer and then for the shards, and is never held in memory.
"""

import glob
import io
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.documents import Document, ReadOptions, decode, decode_column
from data_prep.synthetic.specs import parse_tasks, training_examples
from data_prep.synthetic.words import VOCABULARY
from infini_ds.utils.errors import UserError, did_you_mean, first_line

Reader = Callable[[str, ReadOptions], Iterator[Document]]


class SourceKind(NamedTuple):
    """A kind of source.

    Attributes:
        form: how it is written, such as "text:FOLDER".
        has_splits: --split and --subset apply.
        has_text_files: --document-separator applies.
        vocabulary: all words of its texts, if they are few; the tokenizer then has a token for each.
        has_answers: its documents have `answers`.
    """

    form: str
    read: Reader
    has_splits: bool
    has_text_files: bool
    vocabulary: tuple[str, ...] | None
    has_answers: bool


SOURCES: dict[str, SourceKind] = {}


def source(
    form: str,
    has_splits: bool = False,
    has_text_files: bool = False,
    vocabulary: tuple[str, ...] | None = None,
    has_answers: bool = False,
) -> Callable[[Reader], Reader]:
    """Register a reader as the kind before the colon of `form`. The arguments are those of `SourceKind`."""

    def register(read: Reader) -> Reader:
        kind = form.partition(":")[0]
        SOURCES[kind] = SourceKind(form, read, has_splits, has_text_files, vocabulary, has_answers)
        return read

    return register


def find_source(option: str, text: str) -> tuple[SourceKind, str]:
    """Return the kind and the argument of "KIND:ARGUMENT". Raises a UserError for an unknown kind."""
    kind, _, argument = text.partition(":")
    if kind not in SOURCES:
        forms = [found.form for found in SOURCES.values()]
        raise UserError(f"{option} {text}: unknown kind {kind!r}{did_you_mean(kind, forms, cutoff=0.4)}")
    found = SOURCES[kind]
    if (":" in found.form) != bool(argument):
        raise UserError(f"{option} {text}: write it as {found.form}")
    return found, argument


def read_documents(options: ReadOptions) -> Iterator[Document]:
    """Return the documents of `options.source`, lazily. Raises a UserError for what the user can repair."""
    found, argument = find_source(options.option, options.source)
    return found.read(argument, options)


@source("stdlib")
def read_stdlib(_: str, options: ReadOptions) -> Iterator[Document]:
    """The running Python's own library: the help topics of pydoc, then every source file that it came with."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield Document(f"pydoc topic {topic}", topics[topic])
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, ".py", skip={"site-packages", "dist-packages", "__pycache__"}):
        name = path.relative_to(root).as_posix()
        try:
            with tokenize.open(path) as file:
                yield Document(name, file.read())
        except (SyntaxError, UnicodeDecodeError):  # some of Python's own test files are broken on purpose
            yield Document(name, None)


@source("text:FOLDER", has_text_files=True)
def read_text(folder: str, options: ReadOptions) -> Iterator[Document]:
    """Every .txt file of a folder and the folders in it: one document each, or several with --document-separator."""
    if not os.path.isdir(folder):
        raise options.error("no such folder; name one that holds .txt files")
    paths = list(_walk(Path(folder), ".txt"))
    if not paths:
        raise options.error("no .txt file is in that folder or in those in it; name one that holds some")
    for path in paths:
        if options.document_separator is None:
            yield decode(str(path), path.read_bytes(), options.bad_utf8)
        else:
            yield from _read_parts(path, options.document_separator.encode(), options.bad_utf8)


def _read_parts(path: Path, separator: bytes, bad_utf8: str) -> Iterator[Document]:
    """Yield the documents of a file of any size that are divided by lines of nothing but `separator`."""
    number, begin, offset = 1, 0, 0
    lines: list[bytes] = []

    def part() -> Document:
        return decode(f"{path} document {number}", b"".join(lines), bad_utf8, begin)

    with open(path, "rb") as file:
        for line in file:
            offset += len(line)
            if line.strip() != separator:
                lines.append(line)
                continue
            yield part()
            number, begin, lines = number + 1, offset, []
    yield part()


def _walk(root: Path, suffix: str, skip: Collection[str] = ()) -> Iterator[Path]:
    """Yield files below `root` in an order that depends on their names alone, without entering the folders `skip`."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - set(skip))
        for file in sorted(files):
            if file.endswith(suffix):
                yield Path(folder, file)


def _find_files(argument: str, options: ReadOptions) -> list[str]:
    """Return the files of a comma list of paths and globs, those of a glob sorted."""
    files: list[str] = []
    for pattern in argument.split(","):
        found = sorted(glob.glob(pattern, recursive=True)) or ([pattern] if os.path.exists(pattern) else [])
        files += [path for path in found if os.path.isfile(path)]
        if not any(map(os.path.isfile, found)):
            raise options.error(f"{pattern} matches no file; give files or a glob such as 'folder/*'")
    return list(dict.fromkeys(files))


@source("jsonl:FILES")
def read_jsonl(files: str, options: ReadOptions) -> Iterator[Document]:
    """JSON objects, one a line; compression follows from the name: .gz, .zst, .bz2, ...

    They are not read with `datasets`, which names neither the file nor the byte of what is broken, and fails if the
    type of an unused column changes.
    """
    import pyarrow

    for path in _find_files(files, options):
        offset = 0
        with io.BufferedReader(pyarrow.input_stream(path, compression="detect")) as lines:
            for number, line in enumerate(lines, 1):
                name = f"{path} line {number}"
                decoded = decode(name, line, options.bad_utf8, offset)
                offset += len(line)
                if decoded.text is None:
                    yield decoded
                elif decoded.text.strip():
                    try:
                        row = json.loads(decoded.text)
                    except json.JSONDecodeError as error:
                        raise options.error(f"{name} is not JSON ({error}); repair or remove it") from None
                    if not isinstance(row, dict):
                        raise options.error(f"{name} is a JSON {type(row).__name__}, not an object with columns")
                    document = decode_column(name, row, options)
                    yield document._replace(repaired=document.repaired or decoded.repaired)


@source("parquet:FILES")
def read_parquet(files: str, options: ReadOptions) -> Iterator[Document]:
    """Rows of Parquet files. Only the text column is read, as bytes, so that --bad-utf8 applies."""
    import pyarrow
    import pyarrow.parquet

    column = options.text_column
    for path in _find_files(files, options):
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise options.error(f"{path} is not a Parquet file ({error})") from None
        if column not in file.schema_arrow.names:
            raise UserError(
                f"--text-column {column}: {path} has no such column; it has {', '.join(file.schema_arrow.names)}"
            )
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            try:
                texts = batch.column(0).cast(pyarrow.large_binary())
            except pyarrow.ArrowNotImplementedError:
                raise UserError(
                    f"--text-column {column}: {path} holds {batch.schema.types[0]} there, not text; "
                    "choose another column"
                ) from None
            for text in texts:
                yield decode(f"{path} row {number}", text.as_py() or b"", options.bad_utf8)
                number += 1


@source("hf:NAME", has_splits=True)
def read_hf(name: str, options: ReadOptions) -> Iterator[Document]:
    """What `datasets.load_dataset` takes: a name on the hub, or a local folder of the same layout. Streamed."""
    import datasets

    try:
        rows = datasets.load_dataset(name, options.subset, split=options.split, streaming=True)
    except (OSError, ValueError) as error:
        raise options.error(f"`datasets` cannot load it with --split {options.split} ({first_line(error)})") from error
    for number, row in enumerate(rows):
        yield decode_column(f"{name} {options.split} row {number}", row, options)


@source("recall:TASKS", vocabulary=VOCABULARY, has_answers=True)
def read_recall(tasks: str, options: ReadOptions) -> Iterator[Document]:
    """Synthetic examples that only a memory can answer: "TASK,option=value,...+TASK,..."."""
    try:
        parsed = parse_tasks(tasks)
    except UserError as error:
        raise options.error(str(error)) from None
    for number, (task, example) in enumerate(training_examples(parsed)):
        answers = example.spans if task.learn == "answers" else None
        yield Document(f"recall example {number}", example.text, answers=answers)
