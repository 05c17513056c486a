"""What holds after the facts of a story of bAbI, tasks 1 to 5, and every question that they answer.

bAbI's files ask a few questions of a story. The facts answer many more, which a model can learn from: after
"Mary went to the kitchen." the question "Where is Mary?", and where each thing is that she carries.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from infini_ds.utils.errors import UserError

MOVE = re.compile(r"(\w+) (?:moved|went|went back|journeyed|travelled) to the (\w+)\.")
TAKE = re.compile(r"(\w+) (?:got|took|grabbed|picked up) the (\w+)(?: there)?\.")
DROP = re.compile(r"(\w+) (?:left|dropped|discarded|put down) the (\w+)(?: there)?\.")
GIVE = re.compile(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.")
BESIDE = re.compile(r"The (\w+) is (north|south|east|west) of the (\w+)\.")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


class World:
    """People, places and things as the facts read so far have them."""

    def __init__(self, facts: Iterable[str] = ()) -> None:
        self.place: dict[str, str] = {}  # of people
        self.holder: dict[str, str] = {}  # of things
        self.visited: dict[str, list[str | None]] = {}  # of things, in order; None: a place that no fact says
        self.gifts: list[tuple[str, str, str]] = []  # giver, thing, receiver
        self.beside: set[tuple[str, str, str]] = set()  # (a, north, b): a is north of b
        for fact in facts:
            self.read(fact)

    def read(self, fact: str) -> None:
        """Take in a fact.

        Raises:
            UserError: it has none of the forms of tasks 1 to 5.
        """
        if match := MOVE.fullmatch(fact):
            person, place = match.groups()
            self.place[person] = place
            for thing, holder in self.holder.items():
                if holder == person:
                    self._visit(thing, person)
        elif match := TAKE.fullmatch(fact):
            person, thing = match.groups()
            self.holder[thing] = person
            self._visit(thing, person)
        elif match := DROP.fullmatch(fact):
            person, thing = match.groups()
            self.holder.pop(thing, None)
            self._visit(thing, person)
        elif match := GIVE.fullmatch(fact):
            giver, thing, receiver = match.groups()
            self.gifts.append((giver, thing, receiver))
            self.holder[thing] = receiver
        elif match := BESIDE.fullmatch(fact):
            a, side, b = match.groups()
            self.beside |= {(a, side, b), (b, OPPOSITE[side], a)}
        else:
            raise UserError(f"questions=more: {fact!r} is no fact of bAbI's tasks 1 to 5; use questions=all")

    def _visit(self, thing: str, person: str) -> None:
        """Note that a thing is where a person is."""
        place = self.place.get(person)
        visited = self.visited.setdefault(thing, [])
        if not visited or visited[-1] != place:
            visited.append(place)

    def answers(self, task: int) -> dict[str, str]:
        """Return the questions of a task that have one answer now, each with it."""
        return dict(QUESTIONS[task](self))

    def people(self) -> Iterator[tuple[str, str]]:
        for person, place in self.place.items():
            yield f"Where is {person}?", place

    def things(self) -> Iterator[tuple[str, str]]:
        for thing, visited in self.visited.items():
            if visited[-1] is not None:
                yield f"Where is the {thing}?", visited[-1]

    def places_before(self) -> Iterator[tuple[str, str]]:
        for thing, visited in self.visited.items():
            for before, place in pairwise(visited):  # of several visits the last one counts
                if before is not None and place is not None:
                    yield f"Where was the {thing} before the {place}?", before

    def sides(self) -> Iterator[tuple[str, str]]:
        for a, side, b in self.beside:
            if sum(other[1:] == (side, b) for other in self.beside) == 1:
                yield f"What is {side} of the {b}?", a
            if sum(other[:2] == (a, side) for other in self.beside) == 1:
                yield f"What is the {a} {side} of?", b

    def gift_questions(self) -> Iterator[tuple[str, str]]:
        for giver, thing, receiver in self.gifts:  # the last gift of a kind counts
            if all(thing == other[1] for other in self.gifts if other[::2] == (giver, receiver)):
                yield f"What did {giver} give to {receiver}?", thing
            yield f"Who did {giver} give the {thing} to?", receiver
            yield f"Who gave the {thing} to {receiver}?", giver
            yield f"Who gave the {thing}?", giver
            yield f"Who received the {thing}?", receiver


QUESTIONS = {1: World.people, 2: World.things, 3: World.places_before, 4: World.sides, 5: World.gift_questions}
