"""What follows from the facts of a story: all questions of bAbI's tasks 1 to 5 that have one answer."""

import re

import pytest

from data_prep.options import PrepareOptions
from data_prep.sources import read_documents
from data_prep.synthetic.babi_world import QUESTIONS, World
from infini_ds.utils.errors import UserError

STORIES = {
    1: "1 Mary moved to the bathroom.\n2 Mary went back to the hallway.\n3 John moved to the office.\n"
    "4 Where is Mary? \thallway\t2\n",
    2: "1 Mary went to the office.\n2 Mary took the milk there.\n3 Mary took the apple there.\n"
    "4 Where is the milk? \toffice\t2 1\n",
    3: "1 John took the milk.\n2 John went to the office.\n3 John went to the garden.\n"
    "4 John went to the office.\n5 Where was the milk before the office? \tgarden\t1 2 3 4\n",
    4: "1 The office is north of the kitchen.\n2 What is north of the kitchen?\toffice\t1\n",
    5: "1 Mary gave the milk to Fred.\n2 Who received the milk? \tFred\t1\n",
}


def answers(task, *facts):
    world = World()
    for fact in facts:
        world.read(fact)
    return world.answers(task)


def test_people_are_where_they_went_last():
    facts = "Mary moved to the bathroom.", "John travelled to the hallway.", "Mary went back to the garden."
    assert answers(1, *facts) == {"Where is Mary?": "garden", "Where is John?": "hallway"}
    assert answers(1) == {}


def test_things_move_with_who_holds_them_and_stay_where_they_are_left():
    facts = [
        "Mary went to the office.",
        "Mary picked up the milk there.",
        "John took the apple there.",  # no fact says where John is
        "Mary journeyed to the garden.",
        "Mary gave the milk to John.",
        "Mary moved to the kitchen.",
    ]
    assert answers(2, *facts[:2]) == {"Where is the milk?": "office"}
    assert answers(2, *facts[:4]) == {"Where is the milk?": "garden"}
    assert answers(2, *facts) == {"Where is the milk?": "garden"}
    facts += ["John went to the hallway.", "John put down the apple.", "John went back to the bathroom."]
    assert answers(2, *facts) == {"Where is the milk?": "bathroom", "Where is the apple?": "hallway"}


def test_the_place_before_counts_from_the_last_visit():
    facts = ["John got the milk.", "John went to the office.", "John went to the garden.", "John moved to the office."]
    before = "Where was the milk before the {}?".format
    assert answers(3, *facts[:2]) == {}, "no fact says where it was before the office"
    assert answers(3, *facts[:3]) == {before("garden"): "office"}
    assert answers(3, *facts) == {before("garden"): "office", before("office"): "garden"}
    facts += ["John discarded the milk there.", "John went to the kitchen.", "John journeyed to the office."]
    assert answers(3, *facts) == {before("garden"): "office", before("office"): "garden"}, "it lies where it was left"
    facts += ["John grabbed the milk.", "John travelled to the garden."]
    assert answers(3, *facts) == {before("garden"): "office", before("office"): "garden"}
    assert answers(3, *facts, "John went to the kitchen.")[before("kitchen")] == "garden"


def test_sides_hold_both_ways():
    facts = "The office is north of the kitchen.", "The garden is east of the office."
    assert answers(4, facts[0]) == {
        "What is north of the kitchen?": "office",
        "What is the office north of?": "kitchen",
        "What is south of the office?": "kitchen",
        "What is the kitchen south of?": "office",
    }
    assert len(answers(4, *facts)) == 8
    both = answers(4, "The office is north of the kitchen.", "The garden is north of the kitchen.")
    assert "What is north of the kitchen?" not in both and "What is the kitchen south of?" not in both
    assert both["What is the garden north of?"] == "kitchen"


def test_of_gifts_the_last_one_counts():
    facts = ["Mary gave the milk to Fred.", "Fred handed the milk to Bill.", "Mary passed the apple to Fred."]
    assert answers(5, *facts) == {
        "Who did Mary give the milk to?": "Fred",
        "Who gave the milk to Fred?": "Mary",
        "Who did Fred give the milk to?": "Bill",
        "Who gave the milk to Bill?": "Fred",
        "Who gave the milk?": "Fred",
        "Who received the milk?": "Bill",
        "What did Fred give to Bill?": "milk",
        "Who did Mary give the apple to?": "Fred",
        "Who gave the apple to Fred?": "Mary",
        "Who gave the apple?": "Mary",
        "Who received the apple?": "Fred",
    }, "not what Mary gave to Fred, which were two things"


@pytest.fixture
def babi(tmp_path):
    for task, story in STORIES.items():
        (tmp_path / f"qa{task}.txt").write_text(story)
    (tmp_path / "book.txt").write_text("It was a bright day. " * 9)
    return tmp_path


def documents(babi, options):
    spec = f"babi:{babi},books=text:{babi}/book.txt,words=5,{options}"
    return list(read_documents(PrepareOptions(source=spec, out="none").training))


@pytest.mark.parametrize("task", QUESTIONS)
def test_more_questions_are_answered_by_the_facts_before_them(babi, task):
    """And by them alone: when the question was asked last, its answer was another one."""
    extra, numbers = set(), set()
    for document in documents(babi, f"tasks={task},questions=more,names=shuffled,documents=200"):
        world, read, asked = World(), 0, {}
        for begin, end in document.answers:
            *facts, question = re.findall(r" ([^.?]+[.?])", document.text[read:begin])
            for fact in facts:
                world.read(fact)
            answer = document.text[begin:end]
            assert answer == f" {world.answers(task)[question]}" and answer != asked.get(question)
            asked[question] = answer
            extra.add(" ".join(question.split()[:2]))
            read = end
        assert read == len(document.text) and len(document.answers) <= document.text.count(".") + 1
        numbers.add(len(document.answers))
    assert 1 in numbers and len(numbers) > 1
    assert extra == {1: {"Where is"}, 2: {"Where is"}, 3: {"Where was"}, 4: {"What is"}}.get(
        task, {"Who did", "Who gave", "Who received", "What did"}
    )


LONGER = (
    "1 Mary went to the office.\n2 John got the milk there.\n3 Mary got the apple.\n4 John went to the garden.\n"
    "5 Mary moved to the kitchen.\n6 Where is the apple? \tkitchen\t5\n"
)


def test_a_story_can_have_fewer_facts_and_people(babi):
    (babi / "qa2.txt").write_text(LONGER)
    seen = set()
    for document in documents(babi, "tasks=2,questions=more,facts=1-4,people=1-2,documents=300"):
        facts = tuple(re.findall(r"(?:Mary|John) [^.?]+\.", document.text))
        people = {fact.split()[0] for fact in facts}
        *_, (begin, end) = document.answers
        question = re.findall(r"Where is the \w+\?", document.text)[-1]
        assert document.text[begin:end] == f" {World(facts).answers(2)[question]}" and end == len(document.text)
        of_people = [fact for fact in re.findall(r"\d (\w[^?\n]+\.)", LONGER) if fact.split()[0] in people]
        assert facts == tuple(of_people[: len(facts)]) and len(facts) <= 4, "they are a story's first ones"
        seen.add((len(facts), len(people)))
    assert seen == {(2, 1), (3, 1), (3, 2), (4, 2)}, "of John's alone 2 answer, of Mary's 2 and 3"


def test_tasks_have_equally_many_answers(babi):
    """A story of task 1 asks once here, one of task 2 four times, and the facts of both answer others."""
    (babi / "qa2.txt").write_text(STORIES[2] + "".join(f"{n} Where is the milk? \toffice\t2 1\n" for n in (5, 6, 7)))
    for questions in ("all", "more"):
        counts = {1: 0, 2: 0}
        for document in documents(babi, f"tasks=1-2,questions={questions},documents=2000"):
            counts[int(document.name.split()[2])] += len(document.answers)
        assert 0.85 < counts[1] / counts[2] < 1.18, counts


def test_mistakes_are_named(babi):
    (babi / "qa1.txt").write_text(STORIES[1] + "1 Mary sleeps.\n2 Where is Mary? \toffice\t1\n")
    with pytest.raises(UserError, match=r"questions=more: 'Mary sleeps.' is no fact of bAbI's tasks 1 to 5; use"):
        documents(babi, "tasks=1,questions=more")
    assert documents(babi, "tasks=1,questions=all,documents=9")
    (babi / "qa6.txt").write_text(STORIES[1])
    with pytest.raises(UserError, match="tasks=6,questions=more: for tasks 1 to 5 alone; use questions=all"):
        documents(babi, "tasks=6,questions=more")
    assert documents(babi, "tasks=6,questions=all,documents=3")
    for option in "facts=2", "people=1-2":
        with pytest.raises(UserError, match=f"{option} is for questions=more, which asks what these facts answer"):
            documents(babi, f"tasks=1,{option}")
    with pytest.raises(UserError, match="facts=0: give 1 or more"):
        documents(babi, "tasks=2,questions=more,facts=0-4")
    with pytest.raises(UserError, match="tasks=2,facts=1: none of 1,000 stories has a question that so few facts"):
        documents(babi, "tasks=2,questions=more,facts=1")


def test_documents_depend_on_their_number_alone(babi):
    options = "questions=more,names=shuffled,documents={}".format
    assert documents(babi, options(10)) == documents(babi, options(20))[:10]
