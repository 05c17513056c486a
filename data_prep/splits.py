"""Which documents are trained on and which are held out. The same text always falls on the same side."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import xxhash

from data_prep.options import PrepareOptions
from data_prep.sources import Document, ReadOptions, read_documents

Split = Literal["train", "validation"]


@dataclass
class Skipped:
    """Documents left out: empty (nothing but white space), duplicates (training documents that are also in validation),
    undecodable (no text by their encoding). `repaired` ones stay in, with U+FFFD for what was no UTF-8."""

    empty: int = 0
    duplicates: int = 0
    undecodable: int = 0
    repaired: int = 0


def documents(source: ReadOptions, skipped: Skipped) -> Iterator[Document]:
    """Documents of a source that have something in them; counts the others."""
    for document in read_documents(source):
        skipped.repaired += document.repaired
        if document.text is None:
            skipped.undecodable += 1
        elif not document.text.strip():
            skipped.empty += 1
        else:
            yield document


def digest(text: str) -> int:
    """64 bits that stand for a text."""
    return xxhash.xxh3_64_intdigest(text.encode())


def validation_digests(options: PrepareOptions) -> frozenset[int] | None:
    """Digests of the validation documents; None where they are a share of the source, told by each text alone."""
    if not options.separate_validation:
        return None
    return frozenset(digest(document.text) for document in documents(options.validation, Skipped()))


def split_documents(
    options: PrepareOptions, held_out: frozenset[int] | None, skipped: Skipped
) -> Iterator[tuple[Split, Document]]:
    """Every document with its split, in the order of its source. `held_out`: what `validation_digests` gave."""
    if held_out is None:
        bound = options.validation_fraction * 2**64
        for document in documents(options.training, skipped):
            yield ("validation" if digest(document.text) < bound else "train"), document
        return
    for document in documents(options.validation, skipped):
        yield "validation", document
    for document in documents(options.training, skipped):
        if digest(document.text) in held_out:
            skipped.duplicates += 1
        else:
            yield "train", document


def training_texts(options: PrepareOptions, held_out: frozenset[int] | None) -> Iterator[str]:
    """Training documents alone, uncounted."""
    return (document.text for split, document in split_documents(options, held_out, Skipped()) if split == "train")
