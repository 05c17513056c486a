"""What a run is asked to do, and which of it shapes the result."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.sources import SOURCES, ReadOptions, Source, find_source
from infini_ds.utils.errors import UserError

BAD_UTF8 = ("error", "replace", "skip")
TRAIN_TOKENIZER = "train"
# All 256 bytes, the end of text and the padding: below this there is nothing to merge.
SMALLEST_VOCABULARY = 258
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
# Of these the result does not depend, so a finished folder serves whatever they are.
NOT_SHAPING = ("out", "workers", "force")


def byte_count(text: str) -> int:
    """67108864, 64M, 64MB and 64MiB are the same. Raises a ValueError sentence."""
    match = re.fullmatch(r"(\d+)\s*([kmgt]?)(i?b)?", text.lower())
    if match is None:
        raise UserError(f"{text!r} is no number of bytes; write it as 67108864 or 64MiB")
    return int(match[1]) * UNITS[match[2]]


@dataclass(frozen=True)
class PrepareOptions:
    """Every option of `python -m data_prep`, under the same names.

    source: "stdlib", "text:FOLDER", "jsonl:FILES", "parquet:FILES", "hf:NAME" or "recall:TASKS"; what is trained on.
    out: folder to make.
    validation_source, validation_split: where validation documents come from. Without both, a share
        `validation_fraction` of the source's documents, picked by their text.
    split, subset: of an hf: source. text_column: of jsonl:, parquet: and hf: sources.
    document_separator: line that divides the documents of a file, in text: sources; None for a document a file.
    bad_utf8: "error", "replace" or "skip".
    tokenizer: "train", or a folder or hub name of a tokenizer. vocab_size, tokenizer_bytes (UTF-8 bytes of training
        text): of the tokenizer that is trained.
    sequence_length: tokens a row. shard_bytes: bytes a shard before compression, at most.
    workers: tokenizing processes; None for one a CPU. It does not change the result.
    force: make `out` anew even if a finished folder with other options is there.
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
    def words(self) -> tuple[str, ...] | None:
        """Of a source that is made of few words, which the tokenizer then has as they are; None of any other."""
        return find_source("--source", self.source)[0].words

    @property
    def has_answers(self) -> bool:
        """Whether not all tokens of the rows are to be predicted."""
        return find_source("--source", self.source)[0].has_answers

    @property
    def training(self) -> ReadOptions:
        """How the source is read."""
        return self._read("--source", self.source, self.split)

    @property
    def validation(self) -> ReadOptions:
        """How validation documents are read, where they are separate."""
        option, source = (
            ("--validation-source", self.validation_source) if self.validation_source else ("--source", self.source)
        )
        return self._read(option, source, self.validation_split or self.split)

    def _read(self, option: str, source: str, split: str) -> ReadOptions:
        how = self.subset, self.bad_utf8, self.document_separator
        return ReadOptions(option, source, self.text_column, split, *how)


def check(options: PrepareOptions) -> None:
    """Raises a ValueError sentence for the first option that cannot work."""
    sources = [find_source("--source", options.source)[0]]
    if options.validation_source is not None:
        sources.append(find_source("--validation-source", options.validation_source)[0])
    check_splits(options, sources)
    if options.trains_tokenizer and any(found.words != sources[0].words for found in sources):
        raise UserError(
            f"--validation-source {options.validation_source}: its text and that of --source {options.source} have no "
            "words in common; take the same kind of source for both, or name a --tokenizer"
        )
    separator = options.document_separator
    if separator is not None:
        if not any(found.has_files_of_text for found in sources):
            form = next(found.form for found in SOURCES.values() if found.has_files_of_text)
            raise UserError(f"--document-separator {separator!r}: only a {form} source has files to divide")
        if not separator.strip() or separator != separator.strip() or "\n" in separator:
            raise UserError(
                f"--document-separator {separator!r}: give the text of one line, such as '<|endoftext|>', and no white "
                "space around it"
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
            f"--tokenizer-bytes {options.tokenizer_bytes}: a tokenizer needs text to learn from; give 1000000 or more"
        )
    # A row of uint32 tokens whose documents are all one token long: the largest there is, with its header in the shard.
    largest_row = 8 * options.sequence_length + 1024
    if not largest_row <= options.shard_bytes < 2**32:
        raise UserError(
            f"--shard-bytes {options.shard_bytes}: with --sequence-length {options.sequence_length} "
            f"give {largest_row} to {2**32 - 1}"
        )


def check_splits(options: PrepareOptions, sources: list[Source]) -> None:
    """Raises a ValueError sentence where a split or subset is named of a source that has none, or is used twice."""
    with_splits = " or ".join(found.form for found in SOURCES.values() if found.has_splits)
    for name, asked, source in (
        ("split", options.split != "train", sources[0]),
        ("subset", options.subset is not None, next((found for found in sources if found.has_splits), sources[0])),
        ("validation-split", options.validation_split is not None, sources[-1]),
    ):
        if asked and not source.has_splits:
            value = getattr(options, name.replace("-", "_"))
            raise UserError(
                f"--{name} {value}: a {source.form} source has none; use {with_splits}, or --validation-source"
            )
    if options.validation_source is None and options.validation_split == options.split:
        raise UserError(f"--validation-split {options.split}: that is the split trained on; name another")


def shaping(options: PrepareOptions) -> dict[str, Any]:
    """The options that the result depends on, those without effect here set to None, ready for JSON."""
    kept = {name: value for name, value in asdict(options).items() if name not in NOT_SHAPING}
    if options.separate_validation:
        kept["validation_fraction"] = None
    if not options.trains_tokenizer or options.words is not None:
        kept["vocab_size"] = kept["tokenizer_bytes"] = None
    return kept
