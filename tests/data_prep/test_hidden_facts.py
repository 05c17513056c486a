"""Facts in real text: sentences, exact lengths, order and depth; bAbI's files, and the source that is made of them."""

import random
import re
import tarfile
from collections import Counter

import numpy as np
import pytest

from data_prep.documents import Document
from data_prep.options import PrepareOptions
from data_prep.prepare import prepare
from data_prep.sources import read_documents
from data_prep.synthetic.babi import Question, most_frequent_answers, read_babi
from data_prep.synthetic.babi_in_text import shuffle_names
from data_prep.synthetic.haystack import Haystack, hide, hide_at_depth, sentences, words
from infini_ds.data.sources import StreamSpec, open_sources
from infini_ds.data.streams import ValidationRows
from infini_ds.utils.errors import UserError

BOOK = (
    'It was a "bright" day. "Who is there?" she asked. Mr. Brown said nothing!\nThe clocks were striking thirteen, and '
    "nobody (not even Dr. Who) knew why. " + "On and on and on it went " * 50 + "until it stopped. Then all was still. "
)
STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary went to the garden.
5 Where is Mary? \tgarden\t4
1 John went to the office.
2 Where is John? \toffice\t1
"""


def test_sentences_joined_are_the_text():
    found = sentences(BOOK)
    assert "".join(found) == BOOK
    assert found[:3] == ['It was a "bright" day.', ' "Who is there?" she asked.', " Mr. Brown said nothing!"]
    assert found[3].endswith("knew why.") and max(map(len, found)) <= 600
    assert all(word.startswith((" ", "\n")) for sentence in found[1:] for word in words(sentence))
    code = "x = 1\n" * 300
    assert "".join(sentences(code)) == code and max(map(len, sentences(code))) <= 600
    assert "".join(sentences("a" * 2000)) == "a" * 2000 and sentences("") == []


@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 100, 1000])
def test_text_is_drawn_to_the_token(tokens):
    haystack = Haystack.read([Document("a", BOOK)], words)
    everything = [word for sentence in haystack.sentences for word in sentence]
    assert haystack.length == len(everything) == len(BOOK.split())
    for seed in range(20):
        drawn = haystack.draw(random.Random(seed), tokens)
        flat = [word for sentence in drawn for word in sentence]
        assert len(flat) == tokens and all(drawn)
        doubled = "".join(everything * (2 + tokens // len(everything)))
        assert "".join(flat) in doubled or tokens == 0, "consecutive, from the start again after the end"
    assert [word for sentence in haystack.sentences for word in sentence] == everything, "and not changed by that"


def test_no_more_is_read_than_needed():
    def documents():
        yield Document("first", BOOK)
        raise AssertionError("a second document was read")

    assert Haystack.read(documents(), words, 20).length >= 20


def test_facts_stay_in_order_between_sentences():
    text = [[f"s{i}", f"t{i}"] for i in range(10)]
    facts = [[f"fact{i}"] for i in range(4)]
    places = set()
    for seed in range(200):
        hidden = hide(random.Random(seed), facts, text)
        assert [piece for piece in hidden if piece in facts] == facts
        assert [piece for piece in hidden if piece not in facts] == text
        places.add(hidden.index(facts[0]))
    assert {0, 1, 2} <= places
    assert hide(random.Random(0), facts, []) == facts


def test_a_fact_at_a_depth():
    text = [["a"] * 10, ["b"] * 30, ["c"] * 60]
    for depth, place in ((0, 0), (0.04, 0), (0.06, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1, 3)):
        assert hide_at_depth(["fact"], text, depth).index(["fact"]) == place
    assert hide_at_depth(["fact"], [], 0.5) == [["fact"]]


@pytest.fixture
def babi(tmp_path):
    """A folder of bAbI's form with splits in folders, as words in names, and without splits; and an archive."""
    for name in ("split/train/qa1.txt", "split/valid/qa1.txt", "plain/qa1.txt", "plain/qa2.txt"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(STORY if "valid" not in name else STORY.replace("Mary", "Sandra"))
    for split in ("train", "test"):
        file = tmp_path / "published" / f"qa1_single-supporting-fact_{split}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(STORY if split == "train" else STORY.replace("Mary", "Sandra"))
    with tarfile.open(tmp_path / "babi.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "split", "babi")
    return tmp_path


@pytest.mark.parametrize("where", ["split", "published", "babi.tar.xz"])
def test_stories_of_a_split(babi, where):
    train, evaluation = (read_babi(babi / where, split) for split in ("train", "evaluation"))
    assert train == {
        1: [
            [
                Question(("Mary moved to the bathroom.", "John went to the hallway."), "Where is Mary?", "bathroom"),
                Question(
                    ("Mary moved to the bathroom.", "John went to the hallway.", "Mary went to the garden."),
                    "Where is Mary?",
                    "garden",
                ),
            ],
            [Question(("John went to the office.",), "Where is John?", "office")],
        ]
    }
    assert evaluation[1][0][0].question == "Where is Sandra?"


def test_files_without_splits_serve_both(babi):
    assert read_babi(babi / "plain", "train") == read_babi(babi / "plain", "evaluation")
    assert sorted(read_babi(babi / "plain", "train")) == [1, 2]


def test_the_most_frequent_answer_of_each_question(babi):
    stories = read_babi(babi / "plain", "train")[1]
    assert most_frequent_answers(stories) == {"Where is Mary?": "bathroom", "Where is John?": "office"}
    assert most_frequent_answers([*stories, [Question((), "Where is Mary?", "garden")]])["Where is Mary?"] == "garden"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("none,books=stdlib", "none: no folder and no tar archive of bAbI"),
        ("{babi}/published", "books=… is missing: name the text in which facts are hidden, such as books=text:BOOKS"),
        ("{babi}/plain,books=stdlib", "tasks=1-5: there is no file of task 3, but of 1, 2"),
        ("{babi}/plain,books=stdlib,task=1", "babi has no option 'task': did you mean tasks?"),
        ("{babi}/plain,books=stdlib,tasks=1,questions=first", "questions=first: choose last, all"),
        ("{babi}/plain,books=stdlib,tasks=1,names=new", "names=new: choose given, shuffled"),
        ("{babi}/plain,books=text:{babi}/nowhere,tasks=1", "no such folder"),
        ("{babi}/plain,books={babi}/split,tasks=1", "write it as text:{babi}/split"),
        ("{babi},books=stdlib,tasks=1", "task 1 is in"),
        ("{babi}/empty,books=stdlib", "no files qa1.txt, qa2.txt, … of the train split of bAbI are in it"),
        ("{babi}/broken,books=stdlib,tasks=1", "line 2 is not in the form of bAbI"),
    ],
)
def test_mistakes_are_named(babi, options, sentence, tmp_path):
    (babi / "empty").mkdir()
    (babi / "broken").mkdir()
    (babi / "broken" / "qa1.txt").write_text("1 Mary moved.\nMary sat.\n")
    source = "babi:" + options.format(babi=babi)
    with pytest.raises(UserError) as error:
        prepare(PrepareOptions(source=source, out=tmp_path / "out", workers=1), quiet=True)
    assert sentence.format(babi=babi) in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "qa1.txt has no question"),
        (b"1 Mary moved.\n", "qa1.txt has no question"),
        (b"1 Mary moved.\n2 Where is Mary?\t\t1\n", "qa1.txt line 2 has no answer after its question"),
        (b"1 Mary\xff moved.\n", "qa1.txt is not UTF-8 at byte 6"),
    ],
)
def test_a_damaged_file_is_named(content, sentence, tmp_path):
    (tmp_path / "qa1.txt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_babi(tmp_path, "train")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
def test_an_archive_that_is_cut_off_is_named(kind, part, tmp_path):
    (tmp_path / "qa1.txt").write_text(random.Random(0).randbytes(20_000).hex())
    archive = tmp_path / f"babi.tar.{kind}"
    with tarfile.open(archive, f"w:{kind}") as file:
        file.add(tmp_path / "qa1.txt", "qa1.txt")
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match=f"babi.tar.{kind}: no folder and no tar archive of bAbI .*fetch it again"):
        read_babi(archive, "train")


@pytest.mark.parametrize("questions", ["last", "all"])
def test_documents_of_the_source(babi, questions, tmp_path):
    """Their facts are in order in the text, the answers where their spans say, and lengths in words are as asked."""
    book = tmp_path / "books" / "a.txt"
    book.parent.mkdir()
    book.write_text(BOOK * 5)
    spec = f"{babi}/published,books=text:{book.parent},tasks=1,words=60-90,documents=30,questions={questions}"
    documents = list(read_documents(PrepareOptions(source=f"babi:{spec}", out="none").training))
    assert documents == list(read_documents(PrepareOptions(source=f"babi:{spec}", out="none").training))
    assert len(documents) == 30 and len({document.text for document in documents}) == 30
    numbers = set()
    for document in documents:
        text, numbers_of_words = document.text, len(document.text.split())
        assert 60 <= numbers_of_words <= 90
        answers = [text[begin:end] for begin, end in document.answers]
        assert text.endswith(answers[-1]) and document.answers[-1][1] == len(text)
        numbers.add(len(answers))
        if "Mary moved to the bathroom." in text:
            assert text.index("Mary moved to the bathroom.") < text.index(" John went to the hallway.")
            here = text.rindex("Where is Mary?")
            assert answers[-1] == (" garden" if "Mary went to the garden." in text[:here] else " bathroom")
        else:
            assert answers == [" office"]
        for (begin, _), answer in zip(document.answers, answers, strict=True):
            assert text[:begin].endswith("?") and answer.strip() in ("garden", "bathroom", "office")
    assert numbers == ({1} if questions == "last" else {1, 2})


def test_shuffled_names_keep_the_story(tmp_path):
    """Answers stay those that the facts give, and only names of the task's own files occur, all equally often."""
    (tmp_path / "qa1.txt").write_text(STORY)
    spec = f"babi:{tmp_path},books=stdlib,tasks=1,words=5,questions=all,names=shuffled,documents=300"
    texts = [document.text for document in read_documents(PrepareOptions(source=spec, out="none").training)]
    assert 50 < len(set(texts)) <= 2 * 4 * 3 * 2 + 2 * 4
    answers = Counter()
    for text in texts:
        moved = dict(re.findall(r"(\w+) (?:moved|went) to the (\w+)\.", text))
        for match in re.finditer(r"Where is (\w+)\? (\w+)", text):
            before = dict(re.findall(r"(\w+) (?:moved|went) to the (\w+)\.", text[: match.start()]))
            assert before[match[1]] == match[2]
            answers[match[2]] += 1
        assert moved.keys() <= {"Mary", "John"} and set(moved.values()) <= {"bathroom", "hallway", "garden", "office"}
    assert len(answers) == 4 and max(answers.values()) < 1.5 * min(answers.values())


def test_a_shuffled_story_of_every_kind():
    story = [Question(("Fred gave the milk to Bill.",), "Who received the milk?", "Bill")]
    known = {"Fred", "Bill", "milk", "apple", "Jeff"}
    shuffled = {str(shuffle_names(random.Random(seed), story, known)) for seed in range(200)}
    assert len(shuffled) == 3 * 2 * 2  # givers, receivers, things
    assert all(("Mary" not in text) and ("football" not in text) for text in shuffled)
    assert shuffle_names(random.Random(0), story, set()) == story


def test_rows_have_the_loss_over_answers(babi, tmp_path):
    (tmp_path / "book.txt").write_text(BOOK * 20)
    spec = f"{babi}/published,books=text:{tmp_path}/book.txt,tasks=1,words=30-40,documents=40"
    out = tmp_path / "out"
    options = PrepareOptions(
        source=f"babi:{spec}", out=out, sequence_length=64, vocab_size=300, validation_fraction=0.3, workers=1
    )
    prepare(options, quiet=True)
    rows = ValidationRows(open_sources([StreamSpec("--data", str(out))], "", ""))
    learned = sum(int(np.sum(rows[i]["loss_mask"])) for i in range(len(rows)))
    tokens = sum(int(rows[i]["document_lengths"].sum()) for i in range(len(rows)))
    assert 0 < learned < tokens / 5


def test_the_source_of_needles(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK * 20)
    spec = f"needle:books=text:{tmp_path}/book.txt,words=40-200,digits=3,documents=50"
    documents = list(read_documents(PrepareOptions(source=spec, out="none").training))
    places = []
    for document in documents:
        assert 40 <= len(document.text.split()) <= 200
        ((begin, end),) = document.answers
        key = document.text[begin:end]
        assert len(key.split()) == 3 and document.text.endswith(f" what is the pass key ? the pass key is{key}")
        assert document.text.count(f" the pass key is{key} . remember it .") == 1
        places.append(document.text.index("remember it") / len(document.text))
    assert min(places) < 0.2 and max(places) > 0.6 and len({document.text for document in documents}) == 50
    for options, sentence in (
        ("words=3", "books=… is missing"),
        ("books=stdlib,digits=0", "digits=0: give 1 to 100"),
        ("books=stdlib,symbols=2-11", "symbols=11: give 1 to 10"),
        ("books=stdlib,distance=3", "needle has no option 'distance'"),
    ):
        with pytest.raises(UserError, match=sentence):
            list(read_documents(PrepareOptions(source=f"needle:{options}", out="none").training))


def test_pass_keys_of_few_symbols_repeat_them(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK * 20)

    def keys(options):
        spec = f"needle:books=text:{tmp_path}/book.txt,words=40,digits=12,documents=60{options}"
        documents = read_documents(PrepareOptions(source=spec, out="none").training)
        return [d.text[slice(*d.answers[0])].split() for d in documents]

    assert {len(set(key)) for key in keys(",symbols=2")} == {2}
    drawn = keys(",symbols=2-4")
    assert {len(set(key)) for key in drawn} == {2, 3, 4}
    assert len({digit for key in drawn for digit in key}) == 10, "each key has its own digits"
    assert keys(",symbols=10") == keys("")


def test_numbers_of_other_things_stand_in_the_text_too(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK * 20)

    def texts(options):
        spec = f"needle:books=text:{tmp_path}/book.txt,words=200,documents=200,{options}"
        return [d.text for d in read_documents(PrepareOptions(source=spec, out="none").training)]

    counts, after = set(), set()
    for text in texts("distractors=0-4"):
        said = re.findall(r" the (\D+) is ((?:\d ){5})\. remember it \.", text)
        numbers = dict(said)
        assert [thing for thing, _ in said].count("pass key") == 1
        assert text.endswith(f" the pass key is {numbers['pass key'].rstrip()}")
        counts.add(len(said) - 1)
        after.add(said[-1][0] == "pass key")
    assert counts == {0, 1, 2, 3, 4} and after == {True, False}, "the pass key is anywhere among them"
    assert texts("distractors=0") == texts("symbols=10")
