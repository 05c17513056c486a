"""Which documents are trained on and which are held out. The same text is always in the same split.

A source of one document gives its end for validation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import xxhash

from data_prep.documents import Document, ReadOptions
from data_prep.options import PrepareOptions
from data_prep.sources import read_documents

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")


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


@dataclass
class DrawnShares:
    """What the shares that were drawn for the documents of a source say about --validation-fraction.

    Attributes:
        smallest, largest: of the shares, from 0 to 1: a document is held out if its share is below the fraction.
        divided: the source is one document, and its end is held out.
    """

    smallest: float = 1.0
    largest: float = 0.0
    divided: bool = False


def split_documents(
    options: PrepareOptions,
    held_out: frozenset[int] | None,
    skipped: SkipCounts,
    shares: DrawnShares | None = None,
) -> Iterator[tuple[Split, Document]]:
    """Yield every document with its split, in the order of its source.

    Args:
        held_out: as `validation_hashes` returns it.
        skipped, shares: are updated.
    """
    if held_out is None:
        yield from _draw_validation(options, skipped, shares or DrawnShares())
        return
    for document, _ in kept_documents(options.validation, skipped):
        yield "validation", document
    for document, text in kept_documents(options.training, skipped):
        if text_hash(text) in held_out:
            skipped.duplicates += 1
        else:
            yield "train", document


def _draw_validation(
    options: PrepareOptions, skipped: SkipCounts, shares: DrawnShares
) -> Iterator[tuple[Split, Document]]:
    documents = kept_documents(options.training, skipped)
    first = list(islice(documents, 2))
    if len(first) == 1 and (parts := _divide(first[0][0], first[0][1], options.validation_fraction)) is not None:
        shares.divided = True
        yield from zip(SPLITS, parts, strict=True)
        return
    bound = options.validation_fraction * 2**64
    for document, text in chain(first, documents):
        drawn = text_hash(text)
        shares.smallest = min(shares.smallest, drawn / 2**64)
        shares.largest = max(shares.largest, drawn / 2**64)
        yield ("validation" if drawn < bound else "train"), document


def _divide(document: Document, text: str, fraction: float) -> tuple[Document, Document] | None:
    """Return a document without its end, and its end: about `fraction` of it, beginning with a line if possible.

    None if a part would have no text, or if parts of the document are answers.
    """
    cut = round(len(text) * (1 - fraction))
    # Of the places that may be better, the last one in a stretch before the cut that is as long as what follows it.
    nearest = max(0, 2 * cut - len(text))
    for boundary in ("\n", " "):
        found = text.rfind(boundary, nearest, cut)
        if found >= 0 and text[: found + 1].strip():
            cut = found + 1
            break
    before, after = text[:cut], text[cut:]
    if document.answers is not None or not before.strip() or not after.strip():
        return None
    return document._replace(text=before), document._replace(text=after)


def training_texts(options: PrepareOptions, held_out: frozenset[int] | None) -> Iterator[str]:
    """Yield the texts of the training documents, without counting."""
    for split, document in split_documents(options, held_out, SkipCounts()):
        if split == "train" and document.text is not None:
            yield document.text
