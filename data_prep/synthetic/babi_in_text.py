"""Training text from bAbI's stories, their facts hidden in books.

As BABILong does it (Kuratov et al. 2024, arXiv:2406.10149): the facts of a story stand in order among the sentences of
a book, and the question at the end.
"""

import math
import random
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from data_prep.documents import Document
from data_prep.synthetic.babi import Question, Story
from data_prep.synthetic.babi_world import QUESTIONS, World
from data_prep.synthetic.examples import IntRange
from data_prep.synthetic.haystack import Haystack, words
from data_prep.synthetic.in_text import InText
from data_prep.synthetic.specs import parse_options
from data_prep.synthetic.tasks import check_choice, check_range
from infini_ds.utils.errors import UserError

ONE_TO_FIVE = IntRange(1, 5)
ALL = IntRange(1000, 1000)  # more than a story has
# What can stand for each other in tasks 1 to 5: a story stays one if they change places.
PEOPLE = frozenset({"Bill", "Daniel", "Fred", "Jeff", "John", "Mary", "Sandra"})
KINDS = (
    PEOPLE,
    frozenset({"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}),
    frozenset({"apple", "football", "milk"}),
)
NAME = re.compile(r"\w+")


def shuffle_names(rng: random.Random, story: Story, known: Set[str]) -> Story:
    """Return the story with other people, places and things: those that are `known` change places at random."""
    new: dict[str, str] = {}
    for kind in KINDS:
        names = sorted(kind & known)
        new |= zip(names, rng.sample(names, len(names)), strict=True)

    def renamed(text: str) -> str:
        return NAME.sub(lambda match: new.get(match[0], match[0]), text)

    return [Question(tuple(map(renamed, q.facts)), renamed(q.question), renamed(q.answer)) for q in story]


@dataclass(frozen=True)
class BabiInText(InText):
    """What `--source babi:FOLDER,books=SOURCE,option=value,...` writes.

    Attributes:
        tasks: numbers of bAbI's tasks, drawn so that each has as many answers in all as every other.
        questions: "last" asks one question of a story at the end, "all" asks each one where the story has it, "more"
            asks its last one, and between its facts others that they answer.
        names: "given", or "shuffled": in each document the people, places and things of its task change places at
            random, so that a story that comes again is another one.
        facts, people: with questions "more", how many facts a story has at most, from its beginning, and how many of
            its people they are about, drawn at random.
    """

    name: ClassVar[str] = "babi"

    tasks: IntRange = ONE_TO_FIVE
    questions: str = "last"
    names: str = "given"
    facts: IntRange = ALL
    people: IntRange = ALL

    def check(self) -> None:
        super().check()
        check_choice("questions", self.questions, "last", "all", "more")
        check_choice("names", self.names, "given", "shuffled")
        for option, given in self._limits().items():
            check_range(option, given.low, 1, math.inf)
            if given != ALL and self.questions != "more":
                raise UserError(
                    f"{option}={given} is for questions=more, which asks what these facts answer; give both"
                )

    def check_tasks(self, stories: dict[int, list[Story]]) -> None:
        """Raise a UserError if a task is not among those that were read."""
        for number in range(self.tasks.low, self.tasks.high + 1):
            if number not in stories:
                known = ", ".join(map(str, sorted(stories)))
                raise UserError(f"tasks={self.tasks}: there is no file of task {number}, but of {known}")
            if self.questions == "more" and number not in QUESTIONS:
                raise UserError(f"tasks={self.tasks},questions=more: for tasks 1 to 5 alone; use questions=all")

    def write(self, stories: dict[int, list[Story]], haystack: Haystack) -> Iterator[Document]:
        """Yield the documents. Each depends on the seed and its number alone."""
        numbers = range(self.tasks.low, self.tasks.high + 1)
        known = {task: _names(stories[task]) for task in numbers}
        weights = [1 / self._answers_per_story(task, stories[task]) for task in numbers]
        for index in range(self.documents):
            rng = random.Random(f"babi {self.seed} {index}")
            (task,) = rng.choices(numbers, weights)
            sentences = self._draw(rng, task, stories[task], known[task])
            items = [words(f" {text}") + [f" {answer}"] * bool(answer) for text, answer in sentences]
            answers = [int(bool(answer)) for _, answer in sentences]
            yield self.document(f"babi task {task} example {index}", rng, items, answers, haystack)

    def _answers_per_story(self, task: int, stories: list[Story]) -> float:
        """Return how many answers a story has in the mean, of those that have any.

        Raises:
            UserError: none of them has one, as there are too few facts.
        """
        rng = random.Random(0)
        drawn = [list(self._sentences(rng, task, story)) for story in rng.choices(stories, k=1000)]
        if not any(drawn):
            options = ",".join(f"{name}={value}" for name, value in self._limits().items() if value != ALL)
            raise UserError(
                f"tasks={task},{options}: none of 1,000 stories has a question that so few facts answer; give more"
            )
        return fmean(sum(answer != "" for _, answer in sentences) for sentences in drawn if sentences)

    def _limits(self) -> dict[str, IntRange]:
        return {"facts": self.facts, "people": self.people}

    def _draw(self, rng: random.Random, task: int, stories: list[Story], known: Set[str]) -> list[tuple[str, str]]:
        """Return the sentences of one of the stories that have a question, of which `_answers_per_story` found some.

        Args:
            known: the names that change places.
        """
        while True:
            story = rng.choice(stories)
            if self.questions == "more":
                story = story[-1:]  # which has all facts
            if self.names == "shuffled":
                story = shuffle_names(rng, story, known)
            if sentences := list(self._sentences(rng, task, story)):
                return sentences

    def _sentences(self, rng: random.Random, task: int, story: Story) -> Iterator[tuple[str, str]]:
        """Yield the sentences in order, each question with its answer, each fact with ""; none without a question."""
        if self.questions == "more":
            yield from self._more_questions(rng, task, story[-1])
            return
        done = 0
        for question in [rng.choice(story)] if self.questions == "last" else story:
            for fact in question.facts[done:]:
                yield fact, ""
            done = len(question.facts)
            yield question.question, question.answer

    def _more_questions(self, rng: random.Random, task: int, last: Question) -> Iterator[tuple[str, str]]:
        """Yield the facts before a question, the question, and between the facts others that they answer.

        A question comes again once its answer is another one, and the last one never before with its answer: so no
        answer can be copied from where it was asked last. Of fewer facts, the last question is one that they answer.
        """
        facts: Sequence[str] = last.facts
        if self.people != ALL:
            facts = _facts_of_people(rng, facts, self.people.draw(rng))
        if self.facts != ALL:
            facts = facts[: self.facts.draw(rng)]
        at_the_end = (last.question, last.answer)
        if len(facts) < len(last.facts):
            possible = sorted(World(facts).answers(task).items())
            if not possible:
                return
            at_the_end = rng.choice(possible)
        world = World()
        asked: dict[str, str] = {}
        for fact in facts:
            yield fact, ""
            world.read(fact)
            new = sorted(world.answers(task).items() - asked.items() - {at_the_end})
            if new and rng.random() < 0.5:
                question, answer = rng.choice(new)
                asked[question] = answer
                yield question, answer
        yield at_the_end


def _facts_of_people(rng: random.Random, facts: Sequence[str], number: int) -> list[str]:
    """Return the facts about so many people, drawn at random, and those that are about none."""
    people = sorted({fact.split()[0] for fact in facts} & PEOPLE)
    left_out = set(rng.sample(people, max(0, len(people) - number)))
    return [fact for fact in facts if fact.split()[0] not in left_out]


def _names(stories: list[Story]) -> set[str]:
    """Return the people, places and things of some stories."""
    found = {word for story in stories for question in story for fact in question.facts for word in NAME.findall(fact)}
    return found & frozenset().union(*KINDS)


def parse_babi(argument: str) -> tuple[str, BabiInText]:
    """Return the folder and the options of "FOLDER,option=value,...".

    Raises:
        UserError: an option is unknown, or its value is not possible.
    """
    folder, *given = argument.split(",")
    options = BabiInText(**parse_options(argument, given, BabiInText))
    options.check()
    return folder, options
