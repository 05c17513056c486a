"""Documents of which a command writes a part, between two lines of them."""

from pathlib import Path

from infini_ds.utils.errors import UserError


def insert_between(document: str, begin: str, end: str, text: str) -> str:
    """Return the document with `text`, which ends with a line break, between the lines `begin` and `end`.

    Raises:
        UserError: the document does not have the two lines.
    """
    before, found_begin, rest = document.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise UserError(f"--write: the document does not have the lines {begin} and {end}: put them where it goes")
    return f"{before}{begin}\n{text}{end}{after}"


def read_document(file: Path) -> str:
    """Return the text of the file that --write names.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--write {file} cannot be read ({reason}): give a text file that has the markers") from error
