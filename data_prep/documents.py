"""Documents, and how bytes and rows of a table become documents."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from infini_ds.utils.errors import UserError

# What a file that begins with these bytes is, if it was taken for text.
KINDS_OF_FILES = {
    b"\xff\xfe": "it is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "it is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\x1f\x8b": "it is compressed with gzip: unpack it, or for jsonl: give it a name in .gz",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd: unpack it, or for jsonl: give it a name in .zst",
    b"BZh": "it is compressed with bzip2: unpack it, or for jsonl: give it a name in .bz2",
    b"PAR1": "it is a Parquet file: use --source parquet:FILES",
    b"%PDF": "it is a PDF: extract its text first",
    b"PK": "it is a zip archive: unpack it",
}


class Document(NamedTuple):
    """One text.

    Attributes:
        name: where it is from, for errors.
        text: None if it could not be decoded and is left out.
        repaired: what was not UTF-8 has been replaced by U+FFFD.
        answers: begin and end, in characters, of each part that the loss is taken over; None for all of the text.
    """

    name: str
    text: str | None
    repaired: bool = False
    answers: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What a source may need besides its argument.

    Attributes:
        option, source: the name and value of the option that chose the source, for errors.
        text_column, split, subset, bad_utf8, document_separator: as in `PrepareOptions`.
    """

    option: str
    source: str
    text_column: str
    split: str
    subset: str | None
    bad_utf8: str
    document_separator: str | None

    def error(self, sentence: str) -> UserError:
        """Return an error that begins with the option."""
        return UserError(f"{self.option} {self.source}: {sentence}")


def decode(name: str, data: bytes, bad_utf8: str, offset: int = 0) -> Document:
    """Return the document of UTF-8 bytes.

    Args:
        bad_utf8: what to do with bytes that are not UTF-8: "error", "replace" or "skip".
        offset: place of `data` in `name`, for errors.
    """
    try:
        return Document(name, data.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        if bad_utf8 == "error":
            kind = next((f"{what}; " for start, what in KINDS_OF_FILES.items() if data.startswith(start)), "")
            raise UserError(
                f"--bad-utf8 error: {name} is not UTF-8 at byte {offset + error.start}; "
                f"{kind}repair it, or pass --bad-utf8 replace or skip"
            ) from None
    if bad_utf8 == "skip":
        return Document(name, None)
    return Document(name, data.decode(errors="replace"), repaired=True)


def decode_column(name: str, row: dict[str, Any], options: ReadOptions) -> Document:
    """Return the document in the text column of a row. Null counts as an empty document."""
    column = options.text_column
    if column not in row:
        raise UserError(f"--text-column {column}: {name} has no such column; it has {', '.join(map(str, row))}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"--text-column {column}: {name} holds {type(text).__name__} there, not text; choose another column"
        )
    # JSON may escape half a surrogate pair, which is a str in Python and has no form in UTF-8.
    return decode(name, (text or "").encode(errors="surrogatepass"), options.bad_utf8)
