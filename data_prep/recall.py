"""Seeded examples that only a memory can answer: facts, filler, a question. For training text and for evaluation.

    task = find_task("pairs,pairs=4,distance=512")
    example = task.example(seed=0, index=7, tokenize=str.split)
    example.text, example.tokens[: example.answers[0].begin]

Lengths are in tokens of any tokenizer, and exact: an example is made of pieces that are tokenized one by one. Each
piece begins with a space, as the words of a byte-level tokenizer do. There, and where each word is one token, the whole
text gives the same tokens.
"""

import difflib
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from infini_ds.utils.errors import UserError


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Filler and passkey are those of Mohtashami & Jaggi 2023 (arXiv:2305.16300), in words that stand apart. The filler says
# the same again and again: a model learns it in a few steps, and what is left to learn is to recall.
FILLER = words("the grass is green . the sky is blue . the sun is yellow . here we go . there and back again .")
KEYS = words(
    "Adam Alice Amy Andrew Anna Arthur Ben Betty Bill Bob Charles Chris Clara Daisy Dan David Dora Edward Ella Emily "
    "Emma Eric Frank Fred George Grace Harry Helen Henry Ivan Jack James Jane Jim Joe John Julia Kate Kevin Laura Leo "
    "Lily Lisa Lucy Luke Maria Mark Martin Mary Max Mike Nancy Nick Oliver Oscar Paul Peter Rose Ruth Sam Sarah Susan "
    "Tim Tom"
)
VALUES = words(
    "apple ball bear bed bell bird boat book bottle box bread bridge brush bus cake candle car cat chair clock cloud "
    "coat coin cow cup desk dog door dress duck egg fish flag flower fork fox garden hat horse house kite knife lamp "
    "leaf letter map milk moon mouse paper pen picture rabbit ring river rope ship shoe spoon star stone table tree "
    "window"
)
DIGITS = words("0 1 2 3 4 5 6 7 8 9")
MARKS = words("? = ; answer key pass remember it what")
WORDS = tuple(dict.fromkeys(FILLER + MARKS + DIGITS + KEYS + VALUES))  # all that an example is made of

Tokenize = Callable[[str], list]


class Answer(NamedTuple):
    """Where an answer stands, tokens[begin:end]. distance: tokens between the end of its fact and the start of its
    question."""

    begin: int
    end: int
    distance: int


@dataclass(frozen=True)
class Example:
    """Text, its tokens without a start token, and the answers in order. A model that is asked for an answer has read
    all before it, earlier answers included."""

    text: str
    tokens: list
    answers: list[Answer]
    spans: list[tuple[int, int]]  # of the answers in the text


class Writer:
    """Puts an example together."""

    def __init__(self, rng: random.Random, tokenize: Tokenize):
        self.rng, self.tokenize = rng, tokenize
        self.pieces: list[str] = []
        self.tokens: list = []
        self.answers: list[Answer] = []
        self.spans: list[tuple[int, int]] = []

    @property
    def at(self) -> int:
        """Tokens so far."""
        return len(self.tokens)

    def say(self, *words: str) -> int:
        """Adds words as one piece; returns where it ends."""
        text = "".join(f" {word}" for word in words)
        self.pieces.append(text)
        self.tokens += self.tokenize(text)
        return self.at

    def answer(self, *words: str, distance: int) -> None:
        begin, begin_of_text = self.at, sum(map(len, self.pieces))
        self.answers.append(Answer(begin, self.say(*words), distance))
        self.spans.append((begin_of_text, begin_of_text + len(self.pieces[-1])))

    def fill(self, tokens: int) -> None:
        """Adds so many tokens of filler, beginning anywhere in it. In place of a word too long for the rest comes a
        short one.

        Raises ValueError where no word of the filler is one token.
        """
        of_word = {word: self.tokenize(f" {word}") for word in FILLER}
        short = [word for word in FILLER if len(of_word[word]) == 1]
        if tokens and not short:
            raise UserError("recall: the tokenizer cuts each word of the filler in pieces; take a larger vocabulary")
        at, end = self.rng.randrange(len(FILLER)), self.at + tokens
        while self.at < end:
            word = FILLER[at % len(FILLER)]
            if len(of_word[word]) > end - self.at:
                word = self.rng.choice(short)
            self.pieces.append(f" {word}")
            self.tokens += of_word[word]
            at += 1


class Span(NamedTuple):
    """A whole number, "512", or one drawn from "32-512" so that 32 to 64 is about as likely as 256 to 512."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"

    def draw(self, rng: random.Random) -> int:
        return round(math.exp(rng.uniform(math.log(self.low + 1), math.log(self.high + 1)))) - 1


NONE, ONE, FOUR, FAR = Span(0, 0), Span(1, 1), Span(4, 4), Span(512, 512)


@dataclass(frozen=True)
class Task:
    """What all tasks have in common.

    distance: tokens between the end of the last fact and the start of the first question. before: tokens of filler
    ahead of the facts. after: behind the last answer. multiple: more of it behind, until the document with its start
    token is a multiple of so many tokens, so that the documents of a row begin where its segments do. learn: "answers"
    alone, or "all" tokens; documents, seed: of the text that `data_prep` makes; evaluation has its own.
    """

    distance: Span = FAR
    before: Span = NONE
    after: Span = NONE
    multiple: int = 1
    learn: str = "answers"
    documents: int = 10_000
    seed: int = 0

    @property
    def chance(self) -> float:
        """Accuracy of a model that has not read the facts, but knows which answers there are."""
        raise NotImplementedError

    def write(self, writer: Writer) -> None:
        """Facts, `self.between(writer)`, questions."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises a ValueError sentence for an option whose value cannot be."""

    def between(self, writer: Writer) -> None:
        writer.fill(self.distance.draw(writer.rng))

    def example(self, seed: int, index: int, tokenize: Tokenize) -> Example:
        """Example number `index` of a seed, the same on every machine.

        `tokenize`: text that begins with a space to a list of tokens, none of them special.
        Raises ValueError where no word of the filler is one token.
        """
        rng = random.Random(f"{self.name} {seed} {index}")
        writer = Writer(rng, tokenize)
        writer.fill(self.before.draw(rng))
        self.write(writer)
        writer.fill(self.after.draw(rng))
        writer.fill(-(1 + writer.at) % self.multiple)
        return Example("".join(writer.pieces), writer.tokens, writer.answers, writer.spans)


TASKS: dict[str, type[Task]] = {}


def task(name: str) -> Callable[[type[Task]], type[Task]]:
    """Registers a task under its name."""

    def register(kind: type[Task]) -> type[Task]:
        kind.name = name
        TASKS[name] = kind
        return kind

    return register


@task("passkey")
@dataclass(frozen=True)
class Passkey(Task):
    """A number of some digits, to be said again."""

    digits: int = 5

    @property
    def chance(self) -> float:
        return 10.0**-self.digits

    def check(self) -> None:
        within("digits", self.digits, 1, 100)

    def write(self, writer: Writer) -> None:
        number = writer.rng.choices(DIGITS, k=self.digits)
        fact = writer.say("the", "pass", "key", "is", *number, ".", "remember", "it", ".")
        self.between(writer)
        begin = writer.at
        writer.say("what", "is", "the", "pass", "key", "?", "the", "pass", "key", "is")
        writer.answer(*number, distance=begin - fact)


@dataclass(frozen=True)
class Recall(Task):
    """Of tasks with keys and values: how many of each there are to choose from."""

    keys: int = 32
    values: int = 32

    @property
    def chance(self) -> float:
        return 1 / self.values

    def check(self) -> None:
        within("keys", self.keys, 1, len(KEYS))
        within("values", self.values, 2, len(VALUES))

    def some_keys(self, writer: Writer, number: int) -> list[str]:
        """Different ones."""
        return writer.rng.sample(KEYS[: self.keys], number)

    def some_values(self, writer: Writer, number: int) -> list[str]:
        """Each one drawn by itself: an answer says nothing of the others, so that chance is 1 / values for each."""
        return writer.rng.choices(VALUES[: self.values], k=number)


@task("pairs")
@dataclass(frozen=True)
class Pairs(Recall):
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927): keys with a value each, then a question for
    each of some keys, answered before the next one is asked.

    queries: how many questions. No key is asked for again before all have been. first: "key" or "value", which of the
    two a fact says first; a question is a key in any case.
    """

    pairs: Span = FOUR
    queries: Span = ONE
    first: str = "key"

    def check(self) -> None:
        super().check()
        within("pairs", self.pairs.low, 1, self.keys)
        within("pairs", self.pairs.high, 1, self.keys)
        within("queries", self.queries.low, 1, math.inf)
        among("first", self.first, "key", "value")

    def write(self, writer: Writer) -> None:
        pairs, queries = self.pairs.draw(writer.rng), self.queries.draw(writer.rng)
        keys, values = self.some_keys(writer, pairs), self.some_values(writer, pairs)
        facts = zip(keys, values, strict=True) if self.first == "key" else zip(values, keys, strict=True)
        ends = [writer.say(*fact) for fact in facts]
        self.between(writer)
        order: list[int] = []
        for _ in range(queries):
            order = order or writer.rng.sample(range(pairs), pairs)
            asked, begin = order.pop(), writer.at
            writer.say("?", keys[asked])
            writer.answer(values[asked], distance=begin - ends[asked])


@task("variables")
@dataclass(frozen=True)
class Variables(Recall):
    """Variable tracking, after RULER (Hsieh et al. 2024, arXiv:2404.06654): `Anna = lamp ; Tom = Anna ;`, then what the
    last name of a chain stands for. chains: with a value each. hops: names that stand for another name, in each chain.
    distance: from the end of all chains; an answer's own is from the end of its chain."""

    chains: int = 2
    hops: int = 1

    def check(self) -> None:
        super().check()
        within("hops", self.hops, 0, self.keys - 1)
        within("chains", self.chains, 1, self.keys // (self.hops + 1))

    def write(self, writer: Writer) -> None:
        names = self.some_keys(writer, self.chains * (self.hops + 1))
        chains = [names[first :: self.chains] for first in range(self.chains)]
        values = self.some_values(writer, self.chains)
        ends = [0] * self.chains
        for hop in range(self.hops + 1):
            for chain in writer.rng.sample(range(self.chains), self.chains):
                meaning = chains[chain][hop - 1] if hop else values[chain]
                ends[chain] = writer.say(chains[chain][hop], "=", meaning, ";")
        self.between(writer)
        asked, begin = writer.rng.randrange(self.chains), writer.at
        writer.say("?", chains[asked][-1])
        writer.answer(values[asked], distance=begin - ends[asked])


@task("question")
@dataclass(frozen=True)
class Question(Recall):
    """Pairs and one question, asked `first` (what to look for is known while the facts are read), `last`, or both. The
    answer comes at the end in any case, after the same word."""

    pairs: int = 4
    order: str = "last"

    def check(self) -> None:
        super().check()
        within("pairs", self.pairs, 1, self.keys)
        among("order", self.order, "first", "last", "both")

    def write(self, writer: Writer) -> None:
        keys, values = self.some_keys(writer, self.pairs), self.some_values(writer, self.pairs)
        asked = writer.rng.randrange(self.pairs)
        if self.order != "last":
            writer.say("?", keys[asked])
        ends = [writer.say(key, value) for key, value in zip(keys, values, strict=True)]
        self.between(writer)
        begin = writer.at
        if self.order != "first":
            writer.say("?", keys[asked])
        writer.say("answer")
        writer.answer(values[asked], distance=begin - ends[asked])


def within(option: str, value: int, low: int, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{option}={value}: give {low} " + (f"to {high}" if high < math.inf else "or more"))


def among(option: str, value: str, *known: str) -> None:
    if value not in known:
        raise UserError(f"{option}={value}: choose {', '.join(known)}")


def find_task(text: str) -> Task:
    """The task that "NAME,option=value,..." describes.

    Raises ValueError for an unknown task or option (the nearest is named), or a value that cannot be.
    """
    name, *given = text.split(",")
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; {near(name, TASKS)}")
    kinds = {field.name: type(field.default) for field in fields(TASKS[name])}
    options: dict[str, Any] = {}
    for option in given:
        key, _, value = option.partition("=")
        if key not in kinds:
            raise UserError(f"{text}: {name} has no option {key!r}; {near(key, kinds)}")
        options[key] = read_value(key, value, kinds[key])
    found = TASKS[name](**options)
    within("documents", found.documents, 1, math.inf)
    within("multiple", found.multiple, 1, math.inf)
    among("learn", found.learn, "answers", "all")
    found.check()
    return found


def near(name: str, known) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {found[0]}?" if found else f"choose {', '.join(known)}"


def read_value(key: str, value: str, kind: type) -> Any:
    if kind is str:
        return value
    form = r"(\d+)(?:-(\d+))?" if kind is Span else r"(\d+)"
    match = re.fullmatch(form, value)
    if match is None:
        wanted = "a whole number, or two of them such as 32-512" if kind is Span else "a whole number"
        raise UserError(f"{key}={value}: give {wanted}")
    if kind is int:
        return int(value)
    low, high = int(match[1]), int(match[2] or match[1])
    if high < low:
        raise UserError(f"{key}={value}: the smaller number comes first")
    return Span(low, high)


def find_tasks(text: str) -> list[Task]:
    """The tasks of "TASK+TASK+...", each as `find_task` reads it."""
    return [find_task(part) for part in text.split("+")]


def documents(tasks: list[Task]) -> Iterator[tuple[Task, Example]]:
    """The training text of some tasks, which take turns, for a tokenizer with a token a word."""
    for index in range(max(task.documents for task in tasks)):
        for task in tasks:
            if index < task.documents:
                yield task, task.example(task.seed, index, str.split)
