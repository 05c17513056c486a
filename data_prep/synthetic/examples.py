"""An example, and how it is written piece by piece.

Lengths are exact in tokens of any tokenizer, since an example consists of pieces that are tokenized one by one. Each
piece begins with a space, as the words of a byte-level tokenizer do. With such a tokenizer, and with one that has a
token for each word, tokenizing the complete text gives the same tokens.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_prep.synthetic.words import FILLER
from infini_ds.utils.errors import UserError

# From a text that begins with a space to its tokens, none of them special. Tokens are ids, or strings.
Tokenize = Callable[[str], list[Any]]


class Answer(NamedTuple):
    """Where an answer is: tokens[begin:end]. distance: tokens between the end of its fact and its question."""

    begin: int
    end: int
    distance: int


@dataclass(frozen=True)
class Example:
    """A text and its answers, in order.

    Attributes:
        tokens: of the text, without a start token.
        answers: a model that is asked for one has read all before it, earlier answers included.
        spans: (begin, end) of each answer in the text, in characters.
    """

    text: str
    tokens: list[Any]
    answers: list[Answer]
    spans: list[tuple[int, int]]


class ExampleWriter:
    """Writes one example."""

    def __init__(self, rng: random.Random, tokenize: Tokenize):
        self.rng, self.tokenize = rng, tokenize
        self.pieces: list[str] = []
        self.tokens: list[Any] = []
        self.answers: list[Answer] = []
        self.spans: list[tuple[int, int]] = []

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return len(self.tokens)

    def add(self, *words: str) -> int:
        """Add words as one piece, and return the number of tokens so far."""
        text = "".join(f" {word}" for word in words)
        self.pieces.append(text)
        self.tokens += self.tokenize(text)
        return self.length

    def add_answer(self, *words: str, distance: int) -> None:
        """Add words as an answer."""
        begin, begin_of_text = self.length, sum(map(len, self.pieces))
        self.answers.append(Answer(begin, self.add(*words), distance))
        self.spans.append((begin_of_text, begin_of_text + len(self.pieces[-1])))

    def add_filler(self, tokens: int) -> None:
        """Add `tokens` tokens of filler, from a random place in it. A word that is too long is replaced by a short one.

        Raises:
            UserError: no word of the filler is a single token.
        """
        of_word = {word: self.tokenize(f" {word}") for word in FILLER}
        short = [word for word in FILLER if len(of_word[word]) == 1]
        if tokens and not short:
            raise UserError("recall: the tokenizer splits every word of the filler: use one with a larger vocabulary")
        at, end = self.rng.randrange(len(FILLER)), self.length + tokens
        while self.length < end:
            word = FILLER[at % len(FILLER)]
            if len(of_word[word]) > end - self.length:
                word = self.rng.choice(short)
            self.pieces.append(f" {word}")
            self.tokens += of_word[word]
            at += 1

    def finish(self) -> Example:
        """Return the example."""
        return Example("".join(self.pieces), self.tokens, self.answers, self.spans)


class IntRange(NamedTuple):
    """A whole number, "512", or a range, "32-512", from which one is drawn about log-uniformly.

    So 32 to 64 is about as likely as 256 to 512.
    """

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"

    def draw(self, rng: random.Random) -> int:
        return round(math.exp(rng.uniform(math.log(self.low + 1), math.log(self.high + 1)))) - 1
