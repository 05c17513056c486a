"""Where documents come from. To add a kind of source, write a generator of `Document` with `@source("kind:ARGUMENT")`.

Every reader is lazy and yields the same documents in the same order at each call: a corpus is read more than once, for
the tokenizer and then for the shards, and is never held in memory.
"""

import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data_prep.documents import Document, ReadOptions, decode
from data_prep.files import find_files, walk_files, walk_library
from data_prep.hugging_face import read_hugging_face
from data_prep.synthetic.babi import read_babi
from data_prep.synthetic.babi_in_text import parse_babi
from data_prep.synthetic.haystack import Haystack, words
from data_prep.synthetic.in_text import NeedleInText
from data_prep.synthetic.specs import parse_options, parse_tasks, training_examples
from data_prep.synthetic.words import VOCABULARY
from data_prep.tables import read_json_lines, read_parquet_rows
from infini_ds.utils.errors import UserError, did_you_mean

HAYSTACK_WORDS = 5_000_000  # some 400 MB
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
        if os.path.exists(os.path.expanduser(text)):
            raise UserError(f"{option} {text}: say what it is; write it as {_kind_of_path(text)}:{text}")
        forms = [found.form for found in SOURCES.values()]
        raise UserError(f"{option} {text}: unknown kind {kind!r}{did_you_mean(kind, forms, cutoff=0.4)}")
    found = SOURCES[kind]
    if (":" in found.form) != bool(argument):
        raise UserError(f"{option} {text}: write it as {found.form}")
    return found, argument


def _kind_of_path(path: str) -> str:
    """Return the kind of source that a file or folder of this name most likely is."""
    endings = {".jsonl": "jsonl", ".ndjson": "jsonl", ".gz": "jsonl", ".zst": "jsonl", ".parquet": "parquet"}
    return endings.get(os.path.splitext(path)[1].lower(), "text")


def read_documents(options: ReadOptions) -> Iterator[Document]:
    """Return the documents of `options.source`, lazily. Raises a UserError for what the user can repair."""
    found, argument = find_source(options.option, options.source)
    return found.read(argument, options)


LIBRARY_SKIPS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@source("stdlib")
def read_stdlib(_: str, options: ReadOptions) -> Iterator[Document]:
    """The running Python's own library: the help topics of pydoc, then every source file that it came with."""
    return _read_library(LIBRARY_SKIPS)


@source("stdlib-modules")
def read_stdlib_modules(_: str, options: ReadOptions) -> Iterator[Document]:
    """The same without tests and tables of encodings: alike on all systems, of which some lack the tests."""
    return _read_library(LIBRARY_SKIPS | {"test", "tests", "idle_test", "encodings"})


def _read_library(skip: frozenset[str]) -> Iterator[Document]:
    """Yield the help topics of pydoc and the library's source files that lie in no folder of a name in `skip`."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield Document(f"pydoc topic {topic}", topics[topic])
    root = Path(sysconfig.get_path("stdlib"))
    for path in walk_library(root, ".py", skip):
        name = path.relative_to(root).as_posix()
        try:
            with tokenize.open(path) as file:
                yield Document(name, file.read())
        except (SyntaxError, UnicodeDecodeError):  # some of Python's own test files are broken on purpose
            yield Document(name, None)


@source("text:FOLDER", has_text_files=True)
def read_text(folder: str, options: ReadOptions) -> Iterator[Document]:
    """Every .txt file of a folder and the folders in it, or one file: one document each, or several with
    --document-separator.
    """
    folder = os.path.expanduser(folder)
    if os.path.isfile(folder):
        paths = [Path(folder)]
    elif not os.path.isdir(folder):
        raise options.error("no such folder; name one that holds .txt files, or one file")
    else:
        paths = list(walk_files(Path(folder), ".txt", options.error))
    if not paths:
        raise options.error("no .txt file is in that folder or in those in it; name one that holds some")
    for path in paths:
        try:
            if options.document_separator is None:
                yield decode(str(path), path.read_bytes(), options.bad_utf8)
            else:
                yield from _read_parts(path, options.document_separator.encode(), options.bad_utf8)
        except OSError as error:
            raise options.error(f"{path} cannot be read ({error.strerror}); repair or remove it") from error


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


@source("jsonl:FILES")
def read_jsonl(files: str, options: ReadOptions) -> Iterator[Document]:
    """JSON objects, one a line; compression follows from the name: .gz, .zst, .bz2, .lz4."""
    for path in find_files(files, options.error):
        yield from read_json_lines(path, options)


@source("parquet:FILES")
def read_parquet(files: str, options: ReadOptions) -> Iterator[Document]:
    """Rows of Parquet files."""
    for path in find_files(files, options.error):
        yield from read_parquet_rows(path, options)


@source("hf:NAME", has_splits=True)
def read_hf(name: str, options: ReadOptions) -> Iterator[Document]:
    """What `datasets.load_dataset` takes: a name on the hub, or a local folder of the same layout. Streamed."""
    return read_hugging_face(name, options)


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


@source("needle:books=SOURCE", has_answers=True)
def read_needle(argument: str, options: ReadOptions) -> Iterator[Document]:
    """A pass key that is hidden in books: "books=text:BOOKS,option=value,..."."""
    try:
        needle = NeedleInText(**parse_options(options.source, argument.split(","), NeedleInText))
        needle.check()
    except UserError as error:
        raise options.error(str(error)) from None
    yield from needle.write(_read_books(needle.books, options))


@source("babi:FOLDER,books=SOURCE", has_answers=True)
def read_babi_in_books(argument: str, options: ReadOptions) -> Iterator[Document]:
    """Questions of bAbI whose facts are hidden in books: "FOLDER,books=text:BOOKS,option=value,..."."""
    try:
        folder, babi = parse_babi(argument)
        stories = read_babi(os.path.expanduser(folder), "train")
        babi.check_tasks(stories)
    except UserError as error:
        raise options.error(str(error)) from None
    yield from babi.write(stories, _read_books(babi.books, options))


def _read_books(source: str, options: ReadOptions) -> Haystack:
    """Return the text of another source, of which up to HAYSTACK_WORDS words are held in memory."""
    haystack = Haystack.read(read_documents(replace(options, source=source)), words, HAYSTACK_WORDS)
    if not haystack.length:
        raise options.error(f"{source} holds no text; name another source, with books=")
    return haystack
