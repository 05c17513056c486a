"""Where documents come from. To add a kind, write a generator of `Document` and register it with
`@source("kind:ARGUMENT")`.

Every reader is lazy and gives the same documents in the same order each time it is called: a corpus is read more than
once (for the tokenizer, then for the shards) and never held in memory.
"""

import difflib
import glob
import io
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.recall import WORDS, documents, find_tasks
from infini_ds.utils.errors import UserError


class Document(NamedTuple):
    """One text. `text` is None where it did not decode and is left out; `repaired` says bad UTF-8 became U+FFFD.
    `answers`: begin and end of each part of the text that is to be learned; None for all of it."""

    name: str
    text: str | None
    repaired: bool = False
    answers: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What a reader may need besides its argument. `option` and `source` are for error sentences."""

    option: str
    source: str
    text_column: str
    split: str
    subset: str | None
    bad_utf8: str
    document_separator: str | None

    def error(self, sentence: str) -> UserError:
        return UserError(f"{self.option} {self.source}: {sentence}")


Reader = Callable[[str, ReadOptions], Iterator[Document]]


class Source(NamedTuple):
    form: str
    read: Reader
    has_splits: bool
    has_files_of_text: bool
    words: tuple[str, ...] | None
    has_answers: bool


SOURCES: dict[str, Source] = {}


def source(
    form: str,
    has_splits: bool = False,
    has_files_of_text: bool = False,
    words: tuple[str, ...] | None = None,
    has_answers: bool = False,
) -> Callable[[Reader], Reader]:
    """Registers a reader under the word before the colon of `form`; `has_splits`: --split and --subset apply;
    `has_files_of_text`: --document-separator does; `words`: all that its texts are made of, where they are few;
    `has_answers`: its documents say what of them is to be learned."""

    def register(read: Reader) -> Reader:
        SOURCES[form.partition(":")[0]] = Source(form, read, has_splits, has_files_of_text, words, has_answers)
        return read

    return register


def find_source(option: str, text: str) -> tuple[Source, str]:
    """The source and argument that `text` ("kind:argument") names; ValueError names the nearest if none."""
    kind, _, argument = text.partition(":")
    forms = ", ".join(found.form for found in SOURCES.values())
    if kind not in SOURCES:
        near = difflib.get_close_matches(kind, SOURCES, n=1, cutoff=0.4)
        hint = f"did you mean {SOURCES[near[0]].form}? " if near else ""
        raise UserError(f"{option} {text}: unknown kind {kind!r}; {hint}The kinds are {forms}")
    found = SOURCES[kind]
    if (":" in found.form) != bool(argument):
        raise UserError(f"{option} {text}: write it as {found.form}")
    return found, argument


def read_documents(options: ReadOptions) -> Iterator[Document]:
    """Documents of `options.source`, lazily. Raises ValueError sentences for whatever the user can mend."""
    found, argument = find_source(options.option, options.source)
    return found.read(argument, options)


def decode(name: str, data: bytes, bad_utf8: str, offset: int = 0) -> Document:
    """A document of UTF-8 bytes; what is not UTF-8 is dealt with as --bad-utf8 says. `offset`: of `data` in `name`."""
    try:
        return Document(name, data.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        if bad_utf8 == "error":
            raise UserError(
                f"--bad-utf8 error: {name} is not UTF-8 at byte {offset + error.start}; "
                "mend it, or pass --bad-utf8 replace or skip"
            ) from None
        return (
            Document(name, None) if bad_utf8 == "skip" else Document(name, data.decode(errors="replace"), repaired=True)
        )


def take_column(name: str, row: dict[str, Any], options: ReadOptions) -> Document:
    """The text column of a row; null counts as an empty document."""
    column = options.text_column
    if column not in row:
        raise UserError(f"--text-column {column}: {name} has no such column; it has {', '.join(map(str, row))}")
    text = row[column]
    kind = type(text).__name__
    if kind not in ("str", "NoneType"):
        raise UserError(f"--text-column {column}: {name} holds {kind} there, not text; choose another column")
    # JSON may escape half a surrogate pair, which is a str in Python and no text in UTF-8.
    return decode(name, (text or "").encode(errors="surrogatepass"), options.bad_utf8)


def find_files(argument: str, options: ReadOptions) -> list[str]:
    """Files of a comma list of paths and globs, each sorted."""
    files: list[str] = []
    for pattern in argument.split(","):
        found = sorted(glob.glob(pattern, recursive=True)) or ([pattern] if os.path.exists(pattern) else [])
        files += [path for path in found if os.path.isfile(path)]
        if not any(map(os.path.isfile, found)):
            raise options.error(f"{pattern} matches no file; give files or a glob such as 'folder/*'")
    return list(dict.fromkeys(files))


@source("stdlib")
def read_stdlib(_: str, options: ReadOptions) -> Iterator[Document]:
    """The running Python's own library: the help topics of pydoc, then every source file, nothing installed."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield Document(f"pydoc topic {topic}", topics[topic])
    root = Path(sysconfig.get_path("stdlib"))
    for path in walk(root, ".py", skip={"site-packages", "dist-packages", "__pycache__"}):
        name = path.relative_to(root).as_posix()
        try:
            with tokenize.open(path) as file:
                yield Document(name, file.read())
        except (SyntaxError, UnicodeDecodeError):  # some of Python's own test files are broken on purpose
            yield Document(name, None)


@source("text:FOLDER", has_files_of_text=True)
def read_text(folder: str, options: ReadOptions) -> Iterator[Document]:
    """Every .txt file of a folder and the folders in it, one document each, or several with --document-separator."""
    if not os.path.isdir(folder):
        raise options.error("there is no such folder; name one that holds .txt files")
    paths = list(walk(Path(folder), ".txt"))
    if not paths:
        raise options.error("no .txt file is in that folder or in those in it; name one that holds some")
    for path in paths:
        if options.document_separator is None:
            yield decode(str(path), path.read_bytes(), options.bad_utf8)
        else:
            yield from read_parts(path, options.document_separator.encode(), options.bad_utf8)


def read_parts(path: Path, separator: bytes, bad_utf8: str) -> Iterator[Document]:
    """The documents of a file of any size that lie between lines of nothing but `separator`."""
    number, begin, offset, lines = 1, 0, 0, []

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


def walk(root: Path, suffix: str, skip: set[str] = frozenset()) -> Iterator[Path]:
    """Files under `root` in an order that depends on their names alone, without entering folders named in `skip`."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - skip)
        for file in sorted(files):
            if file.endswith(suffix):
                yield Path(folder, file)


@source("jsonl:FILES")
def read_jsonl(files: str, options: ReadOptions) -> Iterator[Document]:
    """JSON objects, one a line. Read here and not with `datasets`, which names neither file nor byte of what is
    broken, and fails where an unused column changes its type. Compression goes by the name: .gz, .zst, .bz2, ..."""
    import pyarrow

    for path in find_files(files, options):
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
                        raise options.error(f"{name} is not JSON ({error}); mend or remove it") from None
                    if not isinstance(row, dict):
                        raise options.error(f"{name} is a JSON {type(row).__name__}, not an object with columns")
                    document = take_column(name, row, options)
                    yield document._replace(repaired=document.repaired or decoded.repaired)


@source("parquet:FILES")
def read_parquet(files: str, options: ReadOptions) -> Iterator[Document]:
    """Rows of Parquet files. Only the text column is read, and as bytes, so that bad UTF-8 can be dealt with."""
    import pyarrow
    import pyarrow.parquet

    column = options.text_column
    for path in find_files(files, options):
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
    """Anything `datasets.load_dataset` takes: a name on the hub, or a local folder laid out alike. Streamed."""
    import datasets

    try:
        rows = datasets.load_dataset(name, options.subset, split=options.split, streaming=True)
    except (OSError, ValueError) as error:
        raise options.error(f"`datasets` cannot load it with --split {options.split} ({first_line(error)})") from error
    for number, row in enumerate(rows):
        yield take_column(f"{name} {options.split} row {number}", row, options)


@source("recall:TASKS", words=WORDS, has_answers=True)
def read_recall(tasks: str, options: ReadOptions) -> Iterator[Document]:
    """Examples that only a memory can answer, made on the spot: "TASK,option=value,...+TASK,..."."""
    try:
        found = find_tasks(tasks)
    except UserError as error:
        raise options.error(str(error)) from None
    for number, (task, example) in enumerate(documents(found)):
        answers = example.spans if task.learn == "answers" else None
        yield Document(f"recall example {number}", example.text, answers=answers)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to go inside a sentence of ours."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
