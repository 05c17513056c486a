"""The tasks that examples belong to, by name.

To add one, write a subclass of `RecallTask` with `@register_task(NAME)`.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from data_prep.synthetic.examples import Example, ExampleWriter, IntRange, Tokenize
from data_prep.synthetic.words import DIGITS, KEYS, VALUES
from infini_ds.utils.errors import UserError

NONE, ONE, FOUR, FAR = IntRange(0, 0), IntRange(1, 1), IntRange(4, 4), IntRange(512, 512)


@dataclass(frozen=True)
class RecallTask:
    """What all tasks have in common: facts, filler, questions.

    Attributes:
        distance: tokens of filler between the end of the last fact and the start of the first question.
        before, after: tokens of filler before the facts and after the last answer.
        multiple: further filler at the end makes the document, with its start token, a multiple of this many tokens, so
            that the documents of a row begin where its segments do.
        learn: the loss is taken over the "answers" alone or over "all" tokens.
        documents, seed: of the text that `data_prep` writes; an evaluation has its own.
    """

    name: ClassVar[str]

    distance: IntRange = FAR
    before: IntRange = NONE
    after: IntRange = NONE
    multiple: int = 1
    learn: str = "answers"
    documents: int = 10_000
    seed: int = 0

    @property
    def chance(self) -> float:
        """Accuracy of a model that knows which answers exist, but has not read the facts."""
        raise NotImplementedError

    def write(self, writer: ExampleWriter) -> None:
        """Write the facts, `self.add_distance(writer)`, and the questions with their answers."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise a UserError for an option whose value is not possible."""
        check_range("documents", self.documents, 1, math.inf)
        check_range("multiple", self.multiple, 1, math.inf)
        check_choice("learn", self.learn, "answers", "all")

    def add_distance(self, writer: ExampleWriter) -> None:
        """Write the filler between facts and questions."""
        writer.add_filler(self.distance.draw(writer.rng))

    def example(self, seed: int, index: int, tokenize: Tokenize) -> Example:
        """Return example number `index` of a seed.

        Raises:
            UserError: no word of the filler is a single token.
        """
        rng = random.Random(f"{self.name} {seed} {index}")
        writer = ExampleWriter(rng, tokenize)
        writer.add_filler(self.before.draw(rng))
        self.write(writer)
        writer.add_filler(self.after.draw(rng))
        writer.add_filler(-(1 + writer.length) % self.multiple)
        return writer.finish()


def evaluation_seed(seed: int) -> int:
    """Return the seed of examples for an evaluation: none of a source, which is 0 or more, so that no text to train on
    has the same facts.
    """
    return -1 - seed


TASKS: dict[str, type[RecallTask]] = {}
Task = TypeVar("Task", bound=RecallTask)


def register_task(name: str) -> Callable[[type[Task]], type[Task]]:
    """Register a task under its name in `recall:` sources and evaluations."""

    def register(task: type[Task]) -> type[Task]:
        task.name = name
        TASKS[name] = task
        return task

    return register


PASSKEY_QUESTION = ["what", "is", "the", "pass", "key", "?", "the", "pass", "key", "is"]


def passkey_fact(number: Sequence[str], of: str = "pass key") -> list[str]:
    """Return the words of the fact that a number of some digits is the pass key, or the number of another thing."""
    return ["the", *of.split(), "is", *number, ".", "remember", "it", "."]


@register_task("passkey")
@dataclass(frozen=True)
class Passkey(RecallTask):
    """A number of some digits, to be repeated."""

    digits: int = 5

    @property
    def chance(self) -> float:
        return 10.0**-self.digits

    def check(self) -> None:
        super().check()
        check_range("digits", self.digits, 1, 100)

    def write(self, writer: ExampleWriter) -> None:
        number = writer.rng.choices(DIGITS, k=self.digits)
        fact = writer.add(*passkey_fact(number))
        self.add_distance(writer)
        begin = writer.length
        writer.add(*PASSKEY_QUESTION)
        writer.add_answer(*number, distance=begin - fact)


@dataclass(frozen=True)
class KeyValueTask(RecallTask):
    """What tasks with keys and values have in common.

    Attributes:
        keys, values: how many of each there are to choose from.
    """

    keys: int = 32
    values: int = 32

    @property
    def chance(self) -> float:
        return 1 / self.values

    def check(self) -> None:
        super().check()
        check_range("keys", self.keys, 1, len(KEYS))
        check_range("values", self.values, 2, len(VALUES))

    def draw_keys(self, writer: ExampleWriter, number: int) -> list[str]:
        """Return different keys."""
        return writer.rng.sample(KEYS[: self.keys], number)

    def draw_values(self, writer: ExampleWriter, number: int) -> list[str]:
        """Return values that are drawn independently: no answer tells of another, so chance is 1 / values for each."""
        return writer.rng.choices(VALUES[: self.values], k=number)


@register_task("pairs")
@dataclass(frozen=True)
class Pairs(KeyValueTask):
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927): keys with a value each, then questions.

    Each question is answered before the next one is asked.

    Attributes:
        queries: number of questions. No key is asked for again before all have been.
        first: which of the two a fact names first, "key" or "value", or "both": all facts of an example have one order,
            which is drawn. A question names a key in any case.
    """

    pairs: IntRange = FOUR
    queries: IntRange = ONE
    first: str = "key"

    def check(self) -> None:
        super().check()
        check_range("pairs", self.pairs.low, 1, self.keys)
        check_range("pairs", self.pairs.high, 1, self.keys)
        check_range("queries", self.queries.low, 1, math.inf)
        check_choice("first", self.first, "key", "value", "both")

    def write(self, writer: ExampleWriter) -> None:
        pairs, queries = self.pairs.draw(writer.rng), self.queries.draw(writer.rng)
        keys, values = self.draw_keys(writer, pairs), self.draw_values(writer, pairs)
        first = writer.rng.choice(("key", "value")) if self.first == "both" else self.first
        facts = zip(keys, values, strict=True) if first == "key" else zip(values, keys, strict=True)
        ends = [writer.add(*fact) for fact in facts]
        self.add_distance(writer)
        order: list[int] = []
        for _ in range(queries):
            order = order or writer.rng.sample(range(pairs), pairs)
            asked, begin = order.pop(), writer.length
            writer.add("?", keys[asked])
            writer.add_answer(values[asked], distance=begin - ends[asked])


@register_task("variables")
@dataclass(frozen=True)
class Variables(KeyValueTask):
    """Variable tracking, after RULER (Hsieh et al. 2024, arXiv:2404.06654).

    `Anna = lamp ; Tom = Anna ;`, then the value of the last name of a chain. `distance` counts from the end of all
    chains, an answer's own distance from the end of its chain.

    Attributes:
        chains: number of chains, with a value each.
        hops: names of a chain that are set to another name.
    """

    chains: int = 2
    hops: int = 1

    def check(self) -> None:
        super().check()
        check_range("hops", self.hops, 0, self.keys - 1)
        check_range("chains", self.chains, 1, self.keys // (self.hops + 1))

    def write(self, writer: ExampleWriter) -> None:
        names = self.draw_keys(writer, self.chains * (self.hops + 1))
        chains = [names[first :: self.chains] for first in range(self.chains)]
        values = self.draw_values(writer, self.chains)
        ends = [0] * self.chains
        for hop in range(self.hops + 1):
            for chain in writer.rng.sample(range(self.chains), self.chains):
                meaning = chains[chain][hop - 1] if hop else values[chain]
                ends[chain] = writer.add(chains[chain][hop], "=", meaning, ";")
        self.add_distance(writer)
        asked, begin = writer.rng.randrange(self.chains), writer.length
        writer.add("?", chains[asked][-1])
        writer.add_answer(values[asked], distance=begin - ends[asked])


@register_task("question")
@dataclass(frozen=True)
class Question(KeyValueTask):
    """Pairs and one question, whose answer comes at the end, after the same word.

    Attributes:
        order: the question is asked "first", so that it is known while the facts are read, "last", or "both".
    """

    pairs: int = 4
    order: str = "last"

    def check(self) -> None:
        super().check()
        check_range("pairs", self.pairs, 1, self.keys)
        check_choice("order", self.order, "first", "last", "both")

    def write(self, writer: ExampleWriter) -> None:
        keys, values = self.draw_keys(writer, self.pairs), self.draw_values(writer, self.pairs)
        asked = writer.rng.randrange(self.pairs)
        if self.order != "last":
            writer.add("?", keys[asked])
        ends = [writer.add(key, value) for key, value in zip(keys, values, strict=True)]
        self.add_distance(writer)
        begin = writer.length
        if self.order != "first":
            writer.add("?", keys[asked])
        writer.add("answer")
        writer.add_answer(values[asked], distance=begin - ends[asked])


def check_range(option: str, value: int, low: int, high: float) -> None:
    """Raise a UserError if a value is not in low..high."""
    if not low <= value <= high:
        raise UserError(f"{option}={value}: give {low} " + (f"to {high}" if high < math.inf else "or more"))


def check_choice(option: str, value: str, *known: str) -> None:
    """Raise a UserError if a value is not one of those that are known."""
    if value not in known:
        raise UserError(f"{option}={value}: choose {', '.join(known)}")
