"""The table of all keys of a recipe, in Markdown, made from where they are declared.

python -m infini_ds.config.reference                        # print it
python -m infini_ds.config.reference --write docs/training.md   # put it between the markers of a document
"""

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path

from infini_ds.config.keys import Key, Section, list_keys, section_of
from infini_ds.config.loader import show
from infini_ds.config.recipe import Recipe
from infini_ds.distributed.entry_point import run_main
from infini_ds.utils.documents import insert_between, read_document

BEGIN = "<!-- keys: written by `python -m infini_ds.config.reference --write docs/training.md` -->"
END = "<!-- end of keys -->"
HEAD = "| key | type | default | meaning | resume |\n|---|---|---|---|---|"


def reference() -> str:
    """Return a heading and a table for the keys of the run, and for each section."""
    tables = [_table("The run", Recipe, "")]
    for name, field in Recipe.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            tables.append(_table(name, section, f"{name}."))
    return "\n\n".join(tables) + "\n"


def insert(document: str) -> str:
    """Return the document with today's table between BEGIN and END.

    Raises:
        UserError: the document does not have the two markers.
    """
    return insert_between(document, BEGIN, END, reference())


def _table(title: str, kind: type[Section], prefix: str) -> str:
    keys = [key for key in list_keys(kind, prefix, elements=True) if "." not in key.name or prefix]
    intro = inspect.getdoc(kind) or ""
    heading = f"### {title}" if kind is Recipe else f"### {title}\n{intro}\n"
    return "\n".join([heading, HEAD, *_rows(keys)])


def _rows(keys: list[Key]) -> Iterator[str]:
    for key in keys:
        words = key.values.removeprefix("an ").removeprefix("a ")
        default = "required" if key.field.is_required() else f"`{show(key.default)}`"
        yield f"| `{key.name}` | {words} | {default} | {key.meaning} | {'may change' if key.resumable else ''} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of this document")
    args = parser.parse_args()
    if args.write is None:
        print(reference(), end="")
    else:
        args.write.write_text(insert(read_document(args.write)))


if __name__ == "__main__":
    run_main(main)
