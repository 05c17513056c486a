"""Splits long texts where GPT-2's pre-tokenizer splits them anyway, so that the tokens stay the same.

`tokenizers` needs about 120 bytes of memory a character: a document of 100 MB at once would take 12 GB.
"""

import json
import re
from collections.abc import Iterator

CHUNK_CHARACTERS = 1 << 18  # of each chunk of a long text, at least
# No alternative of GPT-2's pattern extends from a character that is not white space into white space, or looks back.
BOUNDARY = re.compile(r"(?<=\S)[ \n]")


def split_text(text: str) -> Iterator[str]:
    """Yield the chunks of a text, each about CHUNK_CHARACTERS long. Joined they are the text."""
    begin = 0
    while (boundary := BOUNDARY.search(text, begin + CHUNK_CHARACTERS)) is not None:
        yield text[begin : boundary.start()]
        begin = boundary.start()
    yield text[begin:]


def can_split(tokenizer_json: str) -> bool:
    """Return whether a tokenizer gives the same tokens for the chunks as for the complete text.

    It does if it is byte-level with GPT-2's pattern, and nothing else in it looks at the text.
    """
    spec = json.loads(tokenizer_json)
    before = spec["pre_tokenizer"] or {}
    gpt2_pattern = (
        before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before.get("add_prefix_space", True)
    )
    return gpt2_pattern and spec["normalizer"] is None and all(token["special"] for token in spec["added_tokens"])
