"""`python -m data_prep --source SOURCE --out FOLDER`: text to tokenizer and MDS shards. `prepare` does it."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from data_prep.options import BAD_UTF8, PrepareOptions, byte_count
from data_prep.sources import SOURCES
from infini_ds.utils.errors import UserError, did_you_mean
from infini_ds.utils.logging import setup_logging


class _Parser(argparse.ArgumentParser):
    """Prints one sentence where argparse prints its usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"data_prep: {message}\n")


def _size(text: str) -> int:
    """Return a number of bytes. Raises an error whose sentence argparse shows."""
    try:
        return byte_count(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options, whose defaults are those of `PrepareOptions`."""
    defaults = {field.name: field.default for field in fields(PrepareOptions)}
    parser = _Parser(prog="python -m data_prep", description=__doc__, allow_abbrev=False)

    def add(flag: str, meaning: str, **settings: Any) -> None:
        default = defaults[flag.replace("-", "_")]
        shown = f" (default: {default})" if isinstance(default, str | int | float) and default is not False else ""
        if not settings.get("required"):
            settings["default"] = default
        parser.add_argument(f"--{flag}", help=meaning + shown, **settings)

    forms = ", ".join(kind.form for kind in SOURCES.values())
    add("source", f"where training text comes from: {forms}; FILES is a glob or a comma list", required=True)
    add("out", "folder to write", required=True, metavar="FOLDER")
    add("validation-source", "where validation text comes from, in the same forms", metavar="SOURCE")
    add("validation-split", "split of an hf: source to validate on", metavar="NAME")
    add("validation-fraction", "share of the documents held out, if neither is given", type=float, metavar="SHARE")
    add("split", "split of an hf: source to train on", metavar="NAME")
    add("subset", "subset (configuration) of an hf: source", metavar="NAME")
    add("text-column", "column of jsonl:, parquet: and hf: sources that holds the text", metavar="NAME")
    add("document-separator", "line that divides the documents of a file, in text: sources", metavar="LINE")
    add("bad-utf8", "what to do with text that is not UTF-8", choices=BAD_UTF8)
    add("tokenizer", "'train', or a folder or hub name to load", metavar="NAME")
    add("vocab-size", "tokens of a trained tokenizer", type=int, metavar="N")
    add("tokenizer-bytes", "bytes of training text that it is trained on, at most", type=_size, metavar="BYTES")
    add("sequence-length", "tokens of a row", type=int, metavar="N")
    add("shard-bytes", "bytes of a shard before compression, at most", type=_size, metavar="BYTES")
    add(
        "workers",
        "processes that tokenize (default: one a CPU); the result does not depend on it",
        type=int,
        metavar="N",
    )
    add("force", "replace a finished folder that has other options", action="store_true")
    return parser


def parse(arguments: Sequence[str] | None = None) -> PrepareOptions:
    """Return the options of a command line. Exits with a sentence if there is a mistake in it."""
    parser = make_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        hint = did_you_mean(flag, [f"--{name.replace('_', '-')}" for name in vars(options)])
        parser.error(f"{flag}: no such option{hint}")
    return PrepareOptions(**vars(options))


def main() -> int:
    """Run the command. Exit codes: 0 done or up to date, 2 the user can repair it, 130 and 143 interrupted."""
    # Raised as an exception, so that the unfinished folder is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse()
    setup_logging(stderr=True)
    try:
        from data_prep.prepare import prepare  # slow to import, so --help and a misspelled option do not wait for it

        prepare(options)
    except UserError as error:
        if os.environ.get("INFINI_DS_TRACEBACK") == "1":
            traceback.print_exception(error)
        print(f"data_prep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"data_prep: interrupted; nothing is left of --out {options.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
