"""Stories with facts, to be asked about: "Anna lamp Tom cow", many segments of filler, then "? Tom".

A story is a number of complete segments, so that a question begins a segment of its own. Then nothing but the memory
passes from the story to the question, and a question to the cache of the story is answered as after the complete text.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from data_prep.synthetic.examples import ExampleWriter
from data_prep.synthetic.specs import parse_tasks
from data_prep.synthetic.tasks import KeyValueTask, Pairs
from data_prep.synthetic.words import KEYS, VALUES
from infini_ds.conversion.locate import locate
from infini_ds.utils.errors import UserError, did_you_mean

SOURCE = "recall:"  # how a source of synthetic examples begins
DATA_MANIFEST = "data_manifest.json"  # of a run


class Fact(NamedTuple):
    """What belongs to a name. text: both words, in the order in which they are written."""

    key: str
    value: str
    text: str


@dataclass(frozen=True)
class LearnedFacts:
    """The facts of a model's training text.

    Attributes:
        keys, values: the words that it was trained on.
        first: the one of the two that its facts name first: "value", or "key", also if some name the value first.
        farthest: most tokens of filler between facts and question; None if it is not known.
    """

    keys: tuple[str, ...]
    values: tuple[str, ...]
    first: str
    farthest: int | None

    @property
    def task(self) -> str:
        """The recall task that evaluates such facts, four pairs and one question."""
        default = KeyValueTask()
        counts = {"keys": len(self.keys), "values": len(self.values)}
        others = [f",{name}={count}" for name, count in counts.items() if count != getattr(default, name)]
        return f"pairs,first={self.first}{''.join(others)}"

    def describe(self) -> str:
        """Return all words, for an error."""
        return f"names are {', '.join(self.keys)}, and things are {', '.join(self.values)}"


def learned_facts(model: Path) -> LearnedFacts:
    """Return the facts of the training text of a run, a checkpoint, or an export that lies in its run.

    For an export elsewhere, which does not say, they are all that exist, in natural order.

    Raises:
        UserError: the model was trained on other text.
    """
    location = locate(model)
    file = (location.run or location.path.resolve().parent) / DATA_MANIFEST
    if not file.is_file():
        return LearnedFacts(KEYS, VALUES, "key", None)
    sources = [stream["manifest"]["options"]["source"] for stream in json.loads(file.read_text())["streams"]]
    of_recall = [source.removeprefix(SOURCE) for source in sources if source.startswith(SOURCE)]
    pairs = [task for source in of_recall for task in parse_tasks(source) if isinstance(task, Pairs)]
    if not pairs:
        raise UserError(f"{model} was trained on {', '.join(sources)}, which has no facts of two words: train on pairs")
    return LearnedFacts(
        keys=KEYS[: max(task.keys for task in pairs)],
        values=VALUES[: max(task.values for task in pairs)],
        first="value" if all(task.first == "value" for task in pairs) else "key",
        farthest=max(task.distance.high for task in pairs),
    )


def known_facts(learned: LearnedFacts, tokenizer: PreTrainedTokenizerBase, model: Path) -> LearnedFacts:
    """Return the facts without words that are not one token each.

    Raises:
        UserError: hardly any are.
    """

    def is_token(word: str) -> bool:
        ids = tokenizer.encode(f" {word}", add_special_tokens=False)
        return len(ids) == 1 and ids[0] != tokenizer.unk_token_id

    keys, values = (tuple(filter(is_token, words)) for words in (learned.keys, learned.values))
    if not keys or len(values) < 2:
        raise UserError(f"{model}: its tokenizer splits names such as {KEYS[0]}: take a model of recall text")
    return LearnedFacts(keys, values, learned.first, learned.farthest)


def parse_facts(option: str, text: str, learned: LearnedFacts) -> list[Fact]:
    """Return the facts in a text such as "Anna lamp Tom cow". The thing may also come first: "lamp Anna".

    Args:
        option: where the text is from, for errors.
    Raises:
        UserError: a word is not known, two words are no fact, or a name has two.
    """
    words = text.split()
    for word in words:
        if word not in learned.keys + learned.values:
            near = did_you_mean(word, learned.keys + learned.values).removeprefix(": ")
            near = f"{near} " if near.endswith("?") else ""
            raise UserError(
                f"{option} {text}: {word} is no word that the model has learned ({near}{learned.describe()})"
            )
    facts: list[Fact] = []
    for first, second in zip(words[::2], [*words[1::2], ""], strict=False):
        key, value = (first, second) if first in learned.keys else (second, first)
        if key not in learned.keys or value not in learned.values:
            raise UserError(
                f"{option} {text}: {f'{first} {second}'.strip()} is no fact: give a name and a thing each, such as "
                f"{learned.keys[0]} {learned.values[0]}"
            )
        if any(fact.key == key for fact in facts):
            raise UserError(f"{option} {text}: {key} has two things: give each name one")
        facts.append(Fact(key, value, f"{first} {second}"))
    if not facts:
        raise UserError(f"{option} is empty: give facts, such as {learned.keys[0]} {learned.values[0]}")
    return facts


def draw_facts(learned: LearnedFacts, number: int, rng: random.Random) -> list[Fact]:
    """Return facts about different names and, as far as there are as many, different things.

    Raises:
        UserError: there are fewer names.
    """
    if not 1 <= number <= len(learned.keys):
        raise UserError(f"--pairs {number} must be 1 to {len(learned.keys)}, the names that the model has learned")
    values = rng.sample(learned.values * -(-number // len(learned.values)), number)
    keys = rng.sample(learned.keys, number)
    return [_fact(key, value, learned.first == "value") for key, value in zip(keys, values, strict=True)]


def other_facts(facts: Sequence[Fact], learned: LearnedFacts, rng: random.Random) -> list[Fact]:
    """Return facts of the same names in the same order about other things."""
    drawn = [(fact, rng.choice([value for value in learned.values if value != fact.value])) for fact in facts]
    return [_fact(fact.key, value, fact.text.split()[0] != fact.key) for fact, value in drawn]


def _fact(key: str, value: str, value_first: bool) -> Fact:
    return Fact(key, value, f"{value} {key}" if value_first else f"{key} {value}")


@dataclass(frozen=True)
class RecallStory:
    """Facts and filler.

    Attributes:
        segments: complete segments of filler after the one in which the facts end.
        filler: its words.
        tokens: of all, with the start token; complete segments.
    """

    facts: tuple[Fact, ...]
    segments: int
    filler: tuple[str, ...]
    tokens: list[int]

    @property
    def keys(self) -> list[str]:
        return [fact.key for fact in self.facts]

    @property
    def fact_text(self) -> str:
        return " ".join(fact.text for fact in self.facts)

    @property
    def sentences(self) -> int:
        """Number of sentences in the filler."""
        return self.filler.count(".")

    def value_of(self, key: str) -> str:
        return next(fact.value for fact in self.facts if fact.key == key)


def write_story(
    facts: Sequence[Fact],
    segments: int,
    tokenizer: PreTrainedTokenizerBase,
    start_ids: Sequence[int],
    segment_length: int,
    rng: random.Random,
) -> RecallStory:
    """Write a story that begins with its facts.

    Args:
        start_ids: what a document begins with.
    Raises:
        UserError: no word of the filler is a single token.
    """
    of_piece: dict[str, list[int]] = {}

    def tokenize(text: str) -> list[int]:
        if text not in of_piece:
            of_piece[text] = tokenizer.encode(text, add_special_tokens=False)
        return of_piece[text]

    writer = ExampleWriter(rng, tokenize)
    for fact in facts:
        writer.add(*fact.text.split())
    pieces = len(writer.pieces)
    begun = len(start_ids) + writer.length
    writer.add_filler(-begun % segment_length + segments * segment_length)
    filler = tuple(piece.strip() for piece in writer.pieces[pieces:])
    return RecallStory(tuple(facts), segments, filler, [*start_ids, *writer.tokens])
