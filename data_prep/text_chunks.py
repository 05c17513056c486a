"""Cuts long texts where GPT-2's pre-tokenizer cuts them anyway, so that the tokens stay the same.

`tokenizers` takes about 120 bytes of memory a character: a document of 100 MB in one go would take 12 GB.
"""

import json
import re
from collections.abc import Iterator

PIECE = 1 << 18  # characters a piece, at least, where a text is cut
# No alternative of GPT-2's pattern runs from a character that is no white space into white space, and none looks back.
BOUNDARY = re.compile(r"(?<=\S)[ \n]")


def cut(text: str) -> Iterator[str]:
    """Pieces of a text, each about PIECE characters; together they are the text."""
    begin = 0
    while (boundary := BOUNDARY.search(text, begin + PIECE)) is not None:
        yield text[begin : boundary.start()]
        begin = boundary.start()
    yield text[begin:]


def may_cut(tokenizer_json: str) -> bool:
    """Whether a tokenizer gives the same tokens for the pieces as for the whole: byte-level with GPT-2's pattern, and
    nothing else that looks at the text."""
    spec = json.loads(tokenizer_json)
    before = spec["pre_tokenizer"] or {}
    gpt2_pattern = (
        before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before.get("add_prefix_space", True)
    )
    return gpt2_pattern and spec["normalizer"] is None and all(token["special"] for token in spec["added_tokens"])
