"""Ask a model about a story that it has read once, with its memory on, off, and swapped for that of another story."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from infini_ds.evaluation.generation import read_into_cache
from infini_ds.evaluation.model_loading import EvaluatedModel, has_memory
from infini_ds.evaluation.recall_story import (
    Fact,
    LearnedFacts,
    RecallStory,
    draw_facts,
    other_facts,
    parse_facts,
    write_story,
)
from infini_ds.evaluation.scoring import MEMORY_SETTINGS
from infini_ds.evaluation.tables import MEMORY_LABELS
from infini_ds.model import InfiniCache, InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError

SHOWN_ANSWERS = 3  # of each setting of the memory
SHOWN_FILLER = 12  # words at either end of a shortened story
MAX_SEGMENTS = 100_000  # of a story, whose words are kept


class Candidate(NamedTuple):
    """A word that may follow, and its probability."""

    word: str
    probability: float


@dataclass(frozen=True)
class Answers:
    """What a model answers to "? KEY" in each setting of the memory.

    candidates: the likeliest words, in order. seconds: of the answer with the memory on.
    """

    key: str
    value: str
    other_value: str  # what the other story says
    candidates: dict[str, list[Candidate]]
    seconds: float

    def is_right(self, setting: str) -> bool:
        return self.candidates[setting][0].word == self.value


@dataclass
class StoryReader:
    """A model and the story that it has read: each question is asked through a copy of the story's cache.

    Attributes:
        learned: the facts that a story can have. seed: of its filler and of the other story.
        story, cache: since the first story was read.
        other, other_cache: a story about the same names and other things, whose memory can be swapped in.
        seconds: that reading the story took.
    """

    evaluated: EvaluatedModel
    learned: LearnedFacts
    seed: int = 0
    story: RecallStory = field(init=False, repr=False)
    other: RecallStory = field(init=False, repr=False)
    cache: InfiniCache = field(init=False, repr=False)
    other_cache: InfiniCache = field(init=False, repr=False)
    seconds: float = field(init=False, repr=False)

    @property
    def model(self) -> InfiniGPTNeoForCausalLM:
        model = self.evaluated.model
        if not has_memory(model):
            raise UserError(f"{self.evaluated.path} has no memory to ask: take a model of this project")
        return model

    def read(self, facts: Sequence[Fact], segments: int) -> None:
        """Write a story, read it, and read another one for its memory."""
        model, rng = self.model, random.Random(f"story {self.seed}")
        shape = (segments, self.evaluated.tokenizer, self.evaluated.start_ids, model.config.segment_length)
        self.story = write_story(facts, *shape, rng)
        self.other = write_story(other_facts(facts, self.learned, rng), *shape, rng)
        started = time.monotonic()
        self.cache = read_into_cache(model, self._ids(self.story.tokens))
        self.seconds = time.monotonic() - started
        self.other_cache = read_into_cache(model, self._ids(self.other.tokens))

    def ask(self, key: str, option: str = "question") -> Answers:
        """Ask for the thing of a name.

        Args:
            option: where the name is from, for errors.
        Raises:
            UserError: the story says nothing of it.
        """
        if key not in self.story.keys:
            names = f"ask for {', '.join(self.story.keys)}"
            raise UserError(f"{option} {key}: the story says nothing of {key}: {names}")
        candidates: dict[str, list[Candidate]] = {}
        seconds = {}
        for setting in MEMORY_SETTINGS:
            started = time.monotonic()
            probabilities = self.probabilities(key, setting)
            seconds[setting] = time.monotonic() - started
            top = probabilities.topk(min(SHOWN_ANSWERS, len(probabilities)))
            words = [self.evaluated.tokenizer.decode([token]).strip() for token in top.indices.tolist()]
            candidates[setting] = [Candidate(w, p) for w, p in zip(words, top.values.tolist(), strict=True)]
        return Answers(key, self.story.value_of(key), self.other.value_of(key), candidates, seconds["on"])

    @torch.no_grad()
    def probabilities(self, key: str, setting: str) -> torch.Tensor:
        """Return the probability of each token (V,) after "? KEY", on the CPU.

        Args:
            setting: of the memory, one of MEMORY_SETTINGS.
        """
        question = self.evaluated.tokenizer.encode(f" ? {key}", add_special_tokens=False)
        cache = self.other_cache if setting == "other" else self.cache
        hidden = self.model.transformer(
            self._ids(question), past_key_values=cache.copy(), use_cache=True, use_memory=setting != "off"
        ).last_hidden_state
        return self.model.lm_head(hidden[0, -1]).float().softmax(-1).cpu()

    def _ids(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor([tokens], dtype=torch.long, device=self.model.device)


def shorten(story: RecallStory) -> str:
    """Return the filler of a story as text, without its middle."""
    left_out = len(story.filler) - 2 * SHOWN_FILLER
    if left_out <= 0:
        return " ".join(story.filler)
    begin, end = " ".join(story.filler[:SHOWN_FILLER]), " ".join(story.filler[-SHOWN_FILLER:])
    return f"{begin} … {left_out:,} more words of filler … {end}"


def describe_reading(reader: StoryReader) -> str:
    """Return a sentence on how long reading took and how large the cache is."""
    tokens = len(reader.story.tokens)
    return (
        f"Read once, in {reader.seconds:.2f} s: {tokens:,} words in {tokens // reader.model.config.segment_length:,} "
        f"segments. The cache has {reader.cache.nbytes():,} bytes, as it would have for a story of any length."
    )


def format_story(reader: StoryReader) -> str:
    """Return the story for the terminal, and how long reading took."""
    story = reader.story
    middle = f"{shorten(story)}\n({story.sentences:,} sentences of filler)" if story.filler else ""
    return f"{story.fact_text}\n{middle}\n\n{describe_reading(reader)}"


def format_answers(answers: Answers) -> str:
    """Return the answers for the terminal, one setting of the memory a line."""
    width = max(map(len, MEMORY_LABELS.values()))
    lines = [f"? {answers.key}"]
    for setting, candidates in answers.candidates.items():
        shown = ", ".join(f"{word} {probability:.3f}" for word, probability in candidates)
        verdict = "right" if answers.is_right(setting) else "wrong"
        if setting == "other":
            verdict += f"; that document says {answers.key} {answers.other_value}"
        lines.append(f"  {MEMORY_LABELS[setting]:<{width}}  {shown}  ({verdict})")
    return "\n".join([*lines, f"  (answered in {1000 * answers.seconds:.1f} ms, from a copy of the cache)"])


@dataclass
class Conversation:
    """What a user types, line by line: a name asks, a number is a new distance, and more words are new facts."""

    reader: StoryReader
    facts: list[Fact]
    segments: int

    def begin(self) -> str:
        """Read the story, and return what to print."""
        self.reader.read(self.facts, self.segments)
        return format_story(self.reader)

    def reply(self, line: str) -> str:
        """Return what to print after a line.

        Raises:
            UserError: a word is not known, or the number is too large.
        """
        words = line.replace("?", " ").split()
        if len(words) == 1 and words[0].isdecimal():
            self.segments = check_segments("segments", int(words[0]))
            return self.begin()
        if len(words) == 1 and words[0] in self.reader.learned.keys:
            return format_answers(self.reader.ask(words[0]))
        self.facts = parse_facts("facts", " ".join(words), self.reader.learned)
        return self.begin()


def check_segments(option: str, segments: int) -> int:
    """Return a number of segments. Raises a UserError if no story has so many."""
    if not 0 <= segments <= MAX_SEGMENTS:
        raise UserError(f"{option} {segments} must be 0 to {MAX_SEGMENTS}")
    return segments


def default_facts(learned: LearnedFacts, number: int, seed: int) -> list[Fact]:
    """Return the facts of the story that is told if the user gives none."""
    return draw_facts(learned, number, random.Random(f"facts {seed}"))
