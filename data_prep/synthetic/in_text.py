"""Training text whose facts are hidden in real text: what all such sources share, and the pass key."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from data_prep.documents import Document
from data_prep.synthetic.examples import IntRange
from data_prep.synthetic.haystack import Haystack, hide
from data_prep.synthetic.tasks import PASSKEY_QUESTION, check_choice, check_range, passkey_fact
from data_prep.synthetic.words import DIGITS
from infini_ds.utils.errors import UserError

SHORT = IntRange(100, 1500)
NUMBERED = ("house number", "room number", "ticket number", "pass word", "page", "price", "train", "year", "bill")
NONE = IntRange(0, 0)
ALL_DIGITS = IntRange(len(DIGITS), len(DIGITS))


@dataclass(frozen=True)
class InText:
    """What sources with hidden facts have in common.

    Attributes:
        books: a source of text in which the facts are hidden.
        words: of a document, facts and questions included; facts that are longer stand alone.
        learn: the loss is taken over the "answers" alone or over "all" tokens.
        documents, seed: how many documents are drawn, with which seed.
    """

    name: ClassVar[str]

    books: str = ""
    words: IntRange = SHORT
    learn: str = "answers"
    documents: int = 10_000
    seed: int = 0

    def check(self) -> None:
        """Raise a UserError for an option whose value is not possible."""
        if not self.books:
            raise UserError("books=… is missing: name the text in which facts are hidden, such as books=text:BOOKS")
        check_range("documents", self.documents, 1, math.inf)
        check_choice("learn", self.learn, "answers", "all")

    def document(
        self, name: str, rng: random.Random, items: Sequence[list[str]], answers: Sequence[int], haystack: Haystack
    ) -> Document:
        """Return a document with the items in order among sentences of text, and the last item at its end.

        Args:
            items: their words, each with the space before it.
            answers: the number of words at the end of each item that are an answer, 0 for a fact.
        """
        *hidden, last = items
        filler = max(0, self.words.draw(rng) - sum(map(len, items)))
        of_item = {id(item): answer for item, answer in zip(items, answers, strict=True)}
        text, spans = "", []
        for piece in [*hide(rng, hidden, haystack.draw(rng, filler)), last]:
            text += "".join(piece)
            if answer := of_item.get(id(piece)):
                spans.append((len(text) - sum(map(len, piece[-answer:])), len(text)))
        return Document(name, text, answers=spans if self.learn == "answers" else None)


@dataclass(frozen=True)
class NeedleInText(InText):
    """What `--source needle:books=SOURCE,option=value,...` writes: the pass key of the evaluation task `needle`.

    Attributes:
        digits: of the pass key.
        symbols: how many different digits a pass key is drawn from. Where they are few, they repeat, and knowing which
            digit follows which does not help.
        distractors: how many numbers of other things stand in the text too, such as "the house number is 4 1 1 7 4 .".
    """

    name: ClassVar[str] = "needle"

    digits: int = 5
    symbols: IntRange = ALL_DIGITS
    distractors: IntRange = NONE

    def check(self) -> None:
        super().check()
        check_range("digits", self.digits, 1, 100)
        for symbols in self.symbols:
            check_range("symbols", symbols, 1, len(DIGITS))

    def write(self, haystack: Haystack) -> Iterator[Document]:
        """Yield the documents. Each depends on the seed and its number alone."""
        for index in range(self.documents):
            rng = random.Random(f"needle {self.seed} {index}")
            symbols = DIGITS if self.symbols == ALL_DIGITS else rng.sample(DIGITS, self.symbols.draw(rng))
            key = rng.choices(symbols, k=self.digits)
            of_others = random.Random(f"distractors {self.seed} {index}")  # the rest is as without distractors
            facts = [passkey_fact(key), *self._distractors(of_others, symbols)]
            of_others.shuffle(facts)
            items = [[f" {word}" for word in words] for words in (*facts, [*PASSKEY_QUESTION, *key])]
            answers = [0] * len(facts) + [self.digits]
            yield self.document(f"needle example {index}", rng, items, answers, haystack)

    def _distractors(self, rng: random.Random, symbols: Sequence[str]) -> list[list[str]]:
        things = rng.choices(NUMBERED, k=self.distractors.draw(rng))
        return [passkey_fact(rng.choices(symbols, k=self.digits), thing) for thing in things]
