"""What a preparation is asked to do, and which of it the result depends on."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.documents import ReadOptions
from data_prep.sources import SOURCES, SourceKind, find_source
from infini_ds.utils.errors import UserError

BAD_UTF8 = ("error", "replace", "skip")
TRAIN_TOKENIZER = "train"
# All 256 bytes, the end of text and the padding: below this there is nothing to merge.
SMALLEST_VOCABULARY = 258
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
# The result does not depend on these, so a finished folder is up to date whatever they are.
NOT_IN_CACHE_KEY = ("out", "workers", "force")


def byte_count(text: str) -> int:
    """Return the bytes of a size: 67108864, 64M, 64MB and 64MiB are the same. Raises a UserError if it is not one."""
    match = re.fullmatch(r"(\d+)\s*([kmgt]?)(i?b)?", text.lower())
    if match is None:
        raise UserError(f"{text!r} is not a number of bytes; write it as 67108864 or 64MiB")
    return int(match[1]) * UNITS[match[2]]


@dataclass(frozen=True)
class PrepareOptions:
    """Every option of `python -m data_prep`, under the same names.

    Attributes:
        source: what is trained on: "stdlib", "text:FOLDER", "jsonl:FILES", "parquet:FILES", "hf:NAME",
            "recall:TASKS", "needle:books=SOURCE" or "babi:FOLDER,books=SOURCE".
        out: folder to write.
        validation_source, validation_split: where validation documents come from. Without both, a share
            `validation_fraction` of the source's documents, chosen by their text.
        split, subset: of an hf: source.
        text_column: of jsonl:, parquet: and hf: sources.
        document_separator: line that divides the documents of a file in text: sources; None for one document a file.
        bad_utf8: "error", "replace" or "skip".
        tokenizer: "train", or a folder or hub name of a tokenizer.
        vocab_size, tokenizer_bytes: of the tokenizer that is trained, and of the text that it is trained on, in UTF-8.
        sequence_length: tokens of a row.
        shard_bytes: bytes of a shard before compression, at most.
        workers: tokenizing processes; None for one a CPU. It does not change the result.
        force: replace `out` even if it is a finished folder with other options.
    """

    source: str
    out: str | Path
    validation_source: str | None = None
    validation_split: str | None = None
    validation_fraction: float = 0.02
    split: str = "train"
    subset: str | None = None
    text_column: str = "text"
    document_separator: str | None = None
    bad_utf8: str = "error"
    tokenizer: str = TRAIN_TOKENIZER
    vocab_size: int = 8192
    tokenizer_bytes: int = 32 << 20
    sequence_length: int = 2048
    shard_bytes: int = 64 << 20
    workers: int | None = None
    force: bool = False

    @property
    def separate_validation(self) -> bool:
        return self.validation_source is not None or self.validation_split is not None

    @property
    def trains_tokenizer(self) -> bool:
        return self.tokenizer == TRAIN_TOKENIZER

    @property
    def vocabulary(self) -> tuple[str, ...] | None:
        """All words of the source, if it consists of few; the tokenizer then has a token for each."""
        return find_source("--source", self.source)[0].vocabulary

    @property
    def has_loss_mask(self) -> bool:
        """Whether rows have a loss mask, because not all of their tokens are predicted."""
        return find_source("--source", self.source)[0].has_answers

    @property
    def training(self) -> ReadOptions:
        """How the training source is read."""
        return self._read("--source", self.source, self.split)

    @property
    def validation(self) -> ReadOptions:
        """How validation documents are read, if they are separate."""
        option, source = "--source", self.source
        if self.validation_source:
            option, source = "--validation-source", self.validation_source
        return self._read(option, source, self.validation_split or self.split)

    def _read(self, option: str, source: str, split: str) -> ReadOptions:
        return ReadOptions(option, source, self.text_column, split, self.subset, self.bad_utf8, self.document_separator)


def check_options(options: PrepareOptions) -> None:
    """Raise a UserError for the first option that cannot work."""
    kinds = [find_source("--source", options.source)[0]]
    if options.validation_source is not None:
        kinds.append(find_source("--validation-source", options.validation_source)[0])
    _check_splits(options, kinds)
    _check_separator(options, kinds)
    if options.trains_tokenizer and any(kind.vocabulary != kinds[0].vocabulary for kind in kinds):
        raise UserError(
            f"--validation-source {options.validation_source}: its text and that of --source {options.source} have no "
            "words in common; choose the same kind of source for both, or name a --tokenizer"
        )
    if options.bad_utf8 not in BAD_UTF8:
        raise UserError(f"--bad-utf8 {options.bad_utf8}: choose {', '.join(BAD_UTF8)}")
    if not 0 < options.validation_fraction < 1:
        raise UserError(
            f"--validation-fraction {options.validation_fraction}: give a share between 0 and 1, such as 0.02"
        )
    if options.sequence_length < 2:
        raise UserError(
            f"--sequence-length {options.sequence_length}: a row needs 2 tokens or more, one to predict the other"
        )
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: at least 1 process has to tokenize")
    if options.trains_tokenizer and options.vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--vocab-size {options.vocab_size}: give {SMALLEST_VOCABULARY} or more (256 bytes, 2 special tokens)"
        )
    if options.trains_tokenizer and options.tokenizer_bytes < 1:
        raise UserError(
            f"--tokenizer-bytes {options.tokenizer_bytes}: a tokenizer is trained on text; give 1000000 or more"
        )
    # A row of uint32 tokens whose documents are all one token long is the largest, with its header in the shard.
    largest_row = 8 * options.sequence_length + 1024
    if not largest_row <= options.shard_bytes < 2**32:
        raise UserError(
            f"--shard-bytes {options.shard_bytes}: with --sequence-length {options.sequence_length} "
            f"give {largest_row} to {2**32 - 1}"
        )


def _check_splits(options: PrepareOptions, kinds: list[SourceKind]) -> None:
    """Raise a UserError for a split or subset of a source that has none, or for a split that is used twice."""
    with_splits = " or ".join(kind.form for kind in SOURCES.values() if kind.has_splits)
    for name, value, is_given, kind in (
        ("split", options.split, options.split != "train", kinds[0]),
        ("subset", options.subset, options.subset is not None, next((k for k in kinds if k.has_splits), kinds[0])),
        ("validation-split", options.validation_split, options.validation_split is not None, kinds[-1]),
    ):
        if is_given and not kind.has_splits:
            raise UserError(
                f"--{name} {value}: a {kind.form} source has none; use {with_splits}, or --validation-source"
            )
    if options.validation_source is None and options.validation_split == options.split:
        raise UserError(f"--validation-split {options.split}: that is the split trained on; name another")


def _check_separator(options: PrepareOptions, kinds: list[SourceKind]) -> None:
    """Raise a UserError for a document separator that is not a line, or of sources without files of text."""
    separator = options.document_separator
    if separator is None:
        return
    if not any(kind.has_text_files for kind in kinds):
        form = next(kind.form for kind in SOURCES.values() if kind.has_text_files)
        raise UserError(f"--document-separator {separator!r}: only a {form} source has files to divide")
    if not separator.strip() or separator != separator.strip() or "\n" in separator:
        raise UserError(
            f"--document-separator {separator!r}: give the text of one line, such as '<|endoftext|>', without white "
            "space around it"
        )


def cache_key_options(options: PrepareOptions) -> dict[str, Any]:
    """Return the options that the result depends on, for JSON. Those that have no effect here are None."""
    kept = {name: value for name, value in asdict(options).items() if name not in NOT_IN_CACHE_KEY}
    if options.separate_validation:
        kept["validation_fraction"] = None
    if not options.trains_tokenizer or options.vocabulary is not None:
        kept["vocab_size"] = kept["tokenizer_bytes"] = None
    return kept
