"""bAbI (Weston et al. 2015, arXiv:1502.05698): stories of facts and questions, to be hidden in books.

As BABILong does it (Kuratov et al. 2024, arXiv:2406.10149): the facts of a story stand in order among the sentences of
a book, the question at the end, and the answer is one word. The files are those of the published text form:

    1 Mary moved to the bathroom.
    2 John went to the hallway.
    3 Where is Mary? <tab>bathroom<tab>1
"""

import lzma
import random
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from data_prep.documents import Document
from data_prep.synthetic.babi_world import QUESTIONS, World
from data_prep.synthetic.examples import IntRange
from data_prep.synthetic.haystack import Haystack, words
from data_prep.synthetic.in_text import InText
from data_prep.synthetic.specs import parse_options
from data_prep.synthetic.tasks import check_choice
from infini_ds.utils.errors import UserError, first_line

FILE = re.compile(r"(?:^|/)qa(\d+)(?:_[^/]*)?\.txt$")
SPLITS = {"train": ("train",), "evaluation": ("valid", "test")}  # words in the paths of their files
ONE_TO_FIVE = IntRange(1, 5)
LINE = re.compile(r"(\d+) (.*)")
# What can stand for each other in tasks 1 to 5: a story stays one if they change places.
KINDS = (
    frozenset({"Bill", "Daniel", "Fred", "Jeff", "John", "Mary", "Sandra"}),
    frozenset({"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}),
    frozenset({"apple", "football", "milk"}),
)
NAME = re.compile(r"\w+")
DAMAGED = (EOFError, zlib.error, lzma.LZMAError)  # of a compressed archive that is cut off or changed


@dataclass(frozen=True)
class Question:
    """A question with all facts of its story before it. answer: one word."""

    facts: tuple[str, ...]
    question: str
    answer: str


Story = list[Question]  # the questions of a story in order: the facts of each one begin with those of the one before


def read_babi(path: str | Path, split: str) -> dict[int, list[Story]]:
    """Return the stories of each task in a folder or a tar archive of bAbI's files.

    Args:
        split: "train" or "evaluation". Of files of several splits, told by "train", "valid" or "test" in their paths,
            only those of this one are read.
    Raises:
        UserError: no such files, several of a task, or a line of one is not in bAbI's form.
    """
    named = _read_files(Path(path))
    wanted = SPLITS[split]
    known = {word for words_of in SPLITS.values() for word in words_of}
    labels = {name: {word for word in known if word in name} for name, _ in named}
    if any(labels.values()):
        chosen = next((word for word in wanted if any(word in label for label in labels.values())), None)
        named = [(name, text) for name, text in named if chosen in labels[name]]
    stories: dict[int, list[Story]] = {}
    files: dict[int, str] = {}
    for name, text in named:
        match = FILE.search(name)
        assert match is not None  # of a name that _read_files found
        task = int(match[1])
        if task in files:
            raise UserError(f"{path}: task {task} is in {files[task]} and in {name}; name a folder that holds it once")
        files[task], stories[task] = name, list(_parse(f"{path}: {name}", text))
        if not stories[task]:
            raise UserError(f"{path}: {name} has no question; fetch it again, or remove it")
    if not stories:
        raise UserError(
            f"{path}: no files qa1.txt, qa2.txt, … of the {split} split of bAbI are in it; name its folder or archive"
        )
    return stories


def _read_files(path: Path) -> list[tuple[str, bytes]]:
    """Return name and content of each file of bAbI in a folder or an archive, sorted by name."""
    try:
        return sorted(dict(_folder_files(path) if path.is_dir() else _archive_files(path)).items())
    except (OSError, tarfile.TarError, *DAMAGED) as error:
        reason = first_line(error).rstrip(":")  # of an unknown compression, a list of what was tried follows
        raise UserError(
            f"{path}: no folder and no tar archive of bAbI ({reason}); name one, or fetch it again if it is damaged"
        ) from error


def _folder_files(path: Path) -> Iterator[tuple[str, bytes]]:
    for file in path.rglob("qa*.txt"):
        name = file.relative_to(path).as_posix()
        if FILE.search(name):
            yield name, file.read_bytes()


def _archive_files(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() and FILE.search(member.name) else None
            if content is not None:
                yield member.name, content.read()


def _parse(name: str, content: bytes) -> Iterator[Story]:
    """Yield the stories of a file. A line with number 1 begins one."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 at byte {error.start}; fetch it again") from None
    story: Story = []
    facts: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{name} line {number} is not in the form of bAbI, `1 Mary moved to the bathroom.`")
        if match[1] == "1":
            if story:
                yield story
            story, facts = [], []
        sentence, *rest = match[2].split("\t")
        if rest and not rest[0].strip():
            raise UserError(f"{name} line {number} has no answer after its question; fetch the file again")
        if rest:
            story.append(Question(tuple(facts), sentence.strip(), rest[0].strip()))
        else:
            facts.append(sentence.strip())
    if story:
        yield story


def most_frequent_answers(stories: list[Story]) -> dict[str, str]:
    """Return the most frequent answer of each question, by its text; of equally frequent ones the first by name."""
    counts: dict[str, Counter[str]] = {}
    for story in stories:
        for question in story:
            counts.setdefault(question.question, Counter())[question.answer] += 1
    return {text: min(answers, key=lambda answer: (-answers[answer], answer)) for text, answers in counts.items()}


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
    """

    name: ClassVar[str] = "babi"

    tasks: IntRange = ONE_TO_FIVE
    questions: str = "last"
    names: str = "given"

    def check(self) -> None:
        super().check()
        check_choice("questions", self.questions, "last", "all", "more")
        check_choice("names", self.names, "given", "shuffled")

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
            story = rng.choice(stories[task])
            if self.names == "shuffled":
                story = shuffle_names(rng, story, known[task])
            sentences = list(self._sentences(rng, task, story))
            items = [words(f" {text}") + [f" {answer}"] * bool(answer) for text, answer in sentences]
            answers = [int(bool(answer)) for _, answer in sentences]
            yield self.document(f"babi task {task} example {index}", rng, items, answers, haystack)

    def _answers_per_story(self, task: int, stories: list[Story]) -> float:
        rng = random.Random(0)
        drawn = (self._sentences(rng, task, story) for story in rng.choices(stories, k=1000))
        return fmean(sum(answer != "" for _, answer in sentences) for sentences in drawn)

    def _sentences(self, rng: random.Random, task: int, story: Story) -> Iterator[tuple[str, str]]:
        """Yield the sentences of a document in order, each question with its answer, each fact with ""."""
        if self.questions == "more":
            yield from _more_questions(rng, task, story)
            return
        done = 0
        for question in [rng.choice(story)] if self.questions == "last" else story:
            for fact in question.facts[done:]:
                yield fact, ""
            done = len(question.facts)
            yield question.question, question.answer


def _more_questions(rng: random.Random, task: int, story: Story) -> Iterator[tuple[str, str]]:
    """Yield the facts of a story, its last question, and between the facts others that they answer.

    A question comes again once its answer is another one, and the last one never before with its answer: so no answer
    can be copied from where it was asked last.
    """
    last = story[-1]
    at_the_end = (last.question, last.answer)
    world = World()
    asked: dict[str, str] = {}
    for fact in last.facts:
        yield fact, ""
        world.read(fact)
        new = sorted(world.answers(task).items() - asked.items() - {at_the_end})
        if new and rng.random() < 0.5:
            question, answer = rng.choice(new)
            asked[question] = answer
            yield question, answer
    yield at_the_end


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
