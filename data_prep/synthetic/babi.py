"""bAbI (Weston et al. 2015, arXiv:1502.05698): stories of facts and questions, of which the answer is one word.

The files are those of the published text form:

    1 Mary moved to the bathroom.
    2 John went to the hallway.
    3 Where is Mary? <tab>bathroom<tab>1
"""

import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infini_ds.utils.errors import UserError, first_line

FILE = re.compile(r"(?:^|/)qa(\d+)(?:_[^/]*)?\.txt$")
SPLITS = {"train": ("train",), "evaluation": ("valid", "test")}  # words in the paths of their files
LINE = re.compile(r"(\d+) (.*)")
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
