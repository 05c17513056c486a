"""Real text of an exact length, in which facts are hidden between sentences.

Lengths are in tokens: ids of a tokenizer, or words with the white space before them. Joined, the words are the text.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from data_prep.documents import Document
from infini_ds.utils.hashing import sha256_of_json

SENTENCE_END = re.compile(r"""(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?]["'”’)]*(?=\s+["'“‘(]*[A-Z])""")
LONGEST_SENTENCE = 600  # characters; what is no prose, such as a table, is divided at a line's end or a space
WORD = re.compile(r"\s*\S+")

Tokens = list[Any]


def words(text: str) -> list[str]:
    """Return the words of a text, each with the white space before it."""
    return WORD.findall(text)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with the white space before it. Joined, they are the text."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    found = []
    for begin, end in zip([0, *ends], [*ends, len(text)], strict=True):
        while end - begin > LONGEST_SENTENCE:
            window = text[begin + 1 : begin + LONGEST_SENTENCE]
            cut = max(window.rfind("\n"), window.rfind(" ") if "\n" not in window else -1)
            cut = begin + 1 + (cut if cut > 0 else len(window))
            found.append(text[begin:cut])
            begin = cut
        if begin < end:
            found.append(text[begin:end])
    return found


class Haystack:
    """Sentences of real text, in order, and as tokens."""

    def __init__(self, sentences: Sequence[Tokens]):
        self.sentences = [sentence for sentence in sentences if sentence]
        self.length = sum(map(len, self.sentences))

    @cached_property
    def sha256(self) -> str:
        """A hash of all sentences."""
        return sha256_of_json(self.sentences)

    @classmethod
    def read(
        cls, documents: Iterable[Document], tokenize: Callable[[str], Tokens], tokens: int | None = None
    ) -> "Haystack":
        """Return the haystack of some documents, of which no more are read than have about `tokens` tokens."""
        found: list[Tokens] = []
        length = 0
        for document in documents:
            for sentence in sentences(document.text or ""):
                found.append(tokenize(sentence))
                length += len(found[-1])
                if tokens is not None and length >= tokens:
                    return cls(found)
        return cls(found)

    def draw(self, rng: random.Random, tokens: int) -> list[Tokens]:
        """Return consecutive sentences from a random place that have exactly `tokens` tokens together.

        The first one may lack its beginning, or if it is short, the last one its end. After the last sentence of the
        haystack comes the first one again.
        """
        drawn: list[Tokens] = []
        at, left = rng.randrange(len(self.sentences)), tokens
        while left > 0:
            drawn.append(self.sentences[at % len(self.sentences)])
            at, left = at + 1, left - len(drawn[-1])
        surplus = -left
        if surplus and surplus < len(drawn[0]):
            drawn[0] = drawn[0][surplus:]
        elif surplus:
            drawn[-1] = drawn[-1][:-surplus]
        return drawn


def hide(rng: random.Random, facts: Sequence[Tokens], text: Sequence[Tokens]) -> list[Tokens]:
    """Return the sentences of `text` with the facts among them, in order, at random places between sentences."""
    places = sorted(rng.choices(range(len(text) + 1), k=len(facts)))
    return _insert(facts, text, places)


def hide_at_depth(fact: Tokens, text: Sequence[Tokens], depth: float) -> list[Tokens]:
    """Return the sentences of `text` with a fact at the border of sentences that is nearest to a fraction `depth`."""
    ends = [0]
    for sentence in text:
        ends.append(ends[-1] + len(sentence))
    place = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
    return _insert([fact], text, [place])


def _insert(facts: Sequence[Tokens], text: Sequence[Tokens], places: Sequence[int]) -> list[Tokens]:
    result: list[Tokens] = []
    done = 0
    for fact, place in zip(facts, places, strict=True):
        result += [*text[done:place], fact]
        done = place
    return [*result, *text[done:]]
