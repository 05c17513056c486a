"""Which documents are trained on and which are held out. The same text is always in the same split."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import xxhash

from data_prep.documents import Document, ReadOptions
from data_prep.options import PrepareOptions
from data_prep.sources import read_documents

Split = Literal["train", "validation"]


@dataclass
class SkipCounts:
    """Documents that are left out, and those that were repaired.

    Attributes:
        empty: nothing but white space.
        duplicates: training documents that are also in the validation source.
        undecodable: not text in their encoding.
        repaired: kept, with U+FFFD for what was not UTF-8.
    """

    empty: int = 0
    duplicates: int = 0
    undecodable: int = 0
    repaired: int = 0


def kept_documents(source: ReadOptions, skipped: SkipCounts) -> Iterator[tuple[Document, str]]:
    """Yield the documents of a source that hold text, and their text; count the others."""
    for document in read_documents(source):
        skipped.repaired += document.repaired
        if document.text is None:
            skipped.undecodable += 1
        elif not document.text.strip():
            skipped.empty += 1
        else:
            yield document, document.text


def text_hash(text: str) -> int:
    """Return a 64-bit hash of a text."""
    return xxhash.xxh3_64_intdigest(text.encode())


def validation_hashes(options: PrepareOptions) -> frozenset[int] | None:
    """Return the hashes of the validation documents; None if they are a share of the training source."""
    if not options.separate_validation:
        return None
    return frozenset(text_hash(text) for _, text in kept_documents(options.validation, SkipCounts()))


def split_documents(
    options: PrepareOptions, held_out: frozenset[int] | None, skipped: SkipCounts
) -> Iterator[tuple[Split, Document]]:
    """Yield every document with its split, in the order of its source.

    Args:
        held_out: as `validation_hashes` returns it.
    """
    if held_out is None:
        bound = options.validation_fraction * 2**64
        for document, text in kept_documents(options.training, skipped):
            yield ("validation" if text_hash(text) < bound else "train"), document
        return
    for document, _ in kept_documents(options.validation, skipped):
        yield "validation", document
    for document, text in kept_documents(options.training, skipped):
        if text_hash(text) in held_out:
            skipped.duplicates += 1
        else:
            yield "train", document


def training_texts(options: PrepareOptions, held_out: frozenset[int] | None) -> Iterator[str]:
    """Yield the texts of the training documents, without counting."""
    for split, document in split_documents(options, held_out, SkipCounts()):
        if split == "train" and document.text is not None:
            yield document.text
