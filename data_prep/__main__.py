"""`python -m data_prep --source SOURCE --out FOLDER`: text to tokenizer and MDS shards. `prepare` does it."""

import argparse
import difflib
import signal
import sys
from dataclasses import fields

from data_prep.options import BAD_UTF8, PrepareOptions, byte_count
from data_prep.sources import SOURCES
from infini_ds.utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says one sentence where argparse prints its usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"data_prep: {message}\n")


def size(text: str) -> int:
    """`byte_count` with the error that argparse shows as it is."""
    try:
        return byte_count(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def make_parser() -> Parser:
    defaults = {field.name: field.default for field in fields(PrepareOptions)}
    parser = Parser(prog="python -m data_prep", description=__doc__, allow_abbrev=False)

    def add(flag: str, meaning: str, **settings) -> None:
        default = defaults[flag.replace("-", "_")]
        shown = f" (default: {default})" if isinstance(default, str | int | float) and default is not False else ""
        if not settings.get("required"):
            settings["default"] = default
        parser.add_argument(f"--{flag}", help=meaning + shown, **settings)

    forms = ", ".join(source.form for source in SOURCES.values())
    add("source", f"where training text comes from: {forms}; FILES is a glob or a comma list", required=True)
    add("out", "folder to make", required=True, metavar="FOLDER")
    add("validation-source", "where validation text comes from, in the same forms", metavar="SOURCE")
    add("validation-split", "split of an hf: source to validate on", metavar="NAME")
    add("validation-fraction", "share of the documents held out, where neither is given", type=float, metavar="SHARE")
    add("split", "split of an hf: source to train on", metavar="NAME")
    add("subset", "subset (configuration) of an hf: source", metavar="NAME")
    add("text-column", "column of jsonl:, parquet: and hf: sources that holds the text", metavar="NAME")
    add("document-separator", "line that divides the documents of a file, in text: sources", metavar="LINE")
    add("bad-utf8", "what to do with text that is not UTF-8", choices=BAD_UTF8)
    add("tokenizer", "'train', or a folder or hub name to load", metavar="NAME")
    add("vocab-size", "tokens of a trained tokenizer", type=int, metavar="N")
    add("tokenizer-bytes", "bytes of training text that it learns from, at most", type=size, metavar="BYTES")
    add("sequence-length", "tokens a row", type=int, metavar="N")
    add("shard-bytes", "bytes a shard before compression, at most", type=size, metavar="BYTES")
    add(
        "workers",
        "processes that tokenize (default: one a CPU); the result does not depend on it",
        type=int,
        metavar="N",
    )
    add("force", "replace a finished folder that has other options", action="store_true")
    return parser


def parse(arguments: list[str] | None = None) -> PrepareOptions:
    parser = make_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
        parser.error(f"{flag}: no such option; " + (f"did you mean {near[0]}?" if near else "--help lists them"))
    return PrepareOptions(**vars(options))


def main() -> int:
    """Exit code: 0 done or already there, 2 the user can mend it, 130 and 143 interrupted."""
    # Raised as an exception, so that what was begun is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse()
    try:
        from data_prep.prepare import prepare  # slow to import, so --help and a misspelled option do not wait for it

        prepare(options)
    except UserError as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"data_prep: interrupted; nothing was left of --out {options.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
