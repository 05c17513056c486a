"""Examples of recall: each answer follows from the facts alone, lengths are exact in tokens, and shards hold them."""

import random
import re

import numpy as np
import pytest
import torch
from shards import read_rows, read_token_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from data_prep.encode import answer_mask
from data_prep.packing import Packer, encode_row
from data_prep.prepare import PrepareOptions, load_manifest, prepare
from data_prep.synthetic.examples import IntRange
from data_prep.synthetic.specs import parse_task, parse_tasks, training_examples
from data_prep.synthetic.words import FILLER, KEYS, VALUES, VOCABULARY
from infini_ds.data.batches import collate
from infini_ds.model.loss import IGNORE_INDEX
from infini_ds.utils.errors import UserError

TASKS = (
    "passkey,digits=6",
    "pairs,queries=4",
    "pairs,queries=6,first=value",
    "pairs,queries=3,first=both",
    "variables,chains=3,hops=2",
    "question,order=first",
    "question,order=last",
    "question,order=both",
)


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE of all the words, in which filler and answers are of one token or of several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = [" " + " ".join(FILLER)] * 20 + [f" {word}" for word in VOCABULARY]
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def solve(text: str) -> list[str]:
    """The answers, found by reading."""
    if "pass key" in text:
        return [text.partition("the pass key is ")[2].partition(" .")[0]]
    meaning = dict(re.findall(r"(\w+) = (\w+) ;", text))
    if not meaning:
        facts = text.split()[:8]
        keys, values = (facts[::2], facts[1::2]) if facts[0] in KEYS else (facts[1::2], facts[::2])
        meaning = dict(zip(keys, values, strict=True))
    found = []
    for key in re.findall(r"\? (\w+)", text):
        while key in meaning:
            key = meaning[key]
        found.append(key)
    return found


@pytest.mark.parametrize("spec", [spec for spec in TASKS if "order" not in spec])
def test_answers_follow_from_the_facts(spec):
    task = parse_task(spec)
    for index in range(50):
        example = task.example(0, index, str.split)
        assert example.text.split() == example.tokens
        assert [" ".join(example.tokens[a.begin : a.end]) for a in example.answers] == solve(example.text)


def test_each_example_has_one_of_both_orders():
    task, orders = parse_task("pairs,pairs=6,first=both,distance=5"), []
    for index in range(200):
        facts = task.example(0, index, str.split).tokens[:12]
        order = [word in KEYS for word in facts[:2]]
        assert [word in KEYS for word in facts] == order * 6
        orders.append(order[0])
    assert 70 < sum(orders) < 130


def test_a_question_stands_first_or_last():
    for order, asked in (("first", 1), ("last", 1), ("both", 2)):
        for index in range(30):
            example = parse_task(f"question,distance=9,order={order}").example(0, index, str.split)
            (answer,) = example.answers
            places = [at for at, word in enumerate(example.tokens) if word == "?"]
            key = example.tokens[places[0] + 1]
            facts = example.tokens[2:10] if order != "last" else example.tokens[:8]
            assert dict(zip(facts[::2], facts[1::2], strict=True))[key] == example.tokens[answer.begin]
            assert len(places) == asked
            assert (places[0] == 0) == (order != "last")
            assert example.tokens[answer.begin - 1] == "answer"


@pytest.mark.parametrize("spec", TASKS)
def test_an_example_depends_on_its_seed_and_number_alone(spec):
    task = parse_task(spec)
    random.seed(1)
    texts = [[task.example(seed, index, str.split).text for index in range(20)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 40


def test_an_example_stays_what_it_was():
    """Data and scores of other versions are compared by seed."""
    text = parse_task("pairs,distance=6,queries=2").example(0, 0, str.split).text
    facts, questions = "Andrew clock Clara bear Eric boat David bed", "? Eric boat ? David bed"
    assert text == f" {facts} here we go . there and {questions}"


@pytest.mark.parametrize("spec", TASKS)
@pytest.mark.parametrize("cut", ["words", "bytes"])
def test_distances_are_exact(spec, cut, byte_level):
    """Counted in the text: by how much filler before, between and after makes it longer."""
    tokenize = str.split if cut == "words" else lambda text: byte_level.encode(text).ids
    for index in range(20):
        lengths = []
        for filler in ("distance=0", "distance=41", "distance=41,before=7", "distance=41,before=7,after=5"):
            example = parse_task(f"{spec},{filler}").example(0, index, tokenize)
            assert tokenize(example.text) == example.tokens
            for answer in example.answers:
                assert answer.distance >= parse_task(f"{spec},{filler}").distance.low
            lengths.append(fillers_in(example.text, tokenize))
        assert lengths == [0, 41, 48, 53]


def fillers_in(text: str, tokenize) -> int:
    """Tokens of the words that nothing but filler has."""
    text = text.replace("what is the pass key ?", "").replace("the pass key is", "").replace(". remember it .", "")
    return sum(len(tokenize(f" {word}")) for word in text.split() if word in FILLER)


def test_the_distance_of_each_answer():
    example = parse_task("pairs,distance=11,queries=4").example(3, 0, str.split)
    for answer in example.answers:
        key, value = example.tokens[answer.begin - 1], example.tokens[answer.begin]
        fact_end = example.tokens.index(key) + 2
        assert example.tokens[fact_end - 1] == value
        assert answer.distance == answer.begin - 2 - fact_end  # "?" is where the question starts


def test_documents_may_be_whole_segments():
    task = parse_task("pairs,distance=1-50,multiple=32")
    lengths = {1 + len(task.example(0, index, str.split).tokens) for index in range(100)}
    assert lengths == {32, 64}


def test_answers_are_as_likely_as_chance_says():
    task = parse_task("pairs,values=8,distance=0")
    answers = [task.example(0, index, str.split) for index in range(2000)]
    values = [example.tokens[example.answers[0].begin] for example in answers]
    assert task.chance == 1 / 8
    assert set(values) == set(VALUES[:8])
    assert max(values.count(value) for value in set(values)) / len(values) < 0.16
    assert parse_task("passkey,digits=3").chance == pytest.approx(1e-3)


def test_distances_are_drawn_by_octaves():
    rng = random.Random(0)
    drawn = [IntRange(0, 511).draw(rng) for _ in range(2000)]
    assert min(drawn) == 0
    assert max(drawn) > 500
    assert 0.4 < sum(distance < 22 for distance in drawn) / len(drawn) < 0.6
    assert IntRange(5, 5).draw(rng) == 5


@pytest.mark.parametrize(
    "spec, named",
    [
        ("pears", "did you mean pairs"),
        ("pairs,pear=4", "did you mean pairs"),
        ("pairs,pairs=four", "pairs=four"),
        ("pairs,pairs=33", "pairs=33"),
        ("pairs,queries=0", "queries=0"),
        ("pairs,keys=65", "keys=65"),
        ("pairs,distance=64-32", "distance=64-32"),
        ("variables,chains=20", "chains=20"),
        ("question,order=middle", "order=middle"),
        ("passkey,digits=0", "digits=0"),
        ("passkey,documents=0", "documents=0"),
        ("pairs,first=last", "first=last"),
        ("pairs,multiple=0", "multiple=0"),
    ],
)
def test_mistakes_are_named(spec, named):
    with pytest.raises(UserError, match=re.escape(named)):
        parse_task(spec)


def test_a_tokenizer_of_bytes_has_no_filler():
    with pytest.raises(UserError, match="larger vocabulary"):
        parse_task("pairs").example(0, 0, lambda text: list(text.encode()))


def test_shards_hold_the_examples(tmp_path):
    spec = "pairs,distance=0-20,queries=2,documents=40+passkey,distance=9,documents=20"
    out = tmp_path / "out"
    prepare(PrepareOptions(source=f"recall:{spec}", out=out, sequence_length=64, workers=1), quiet=True)
    manifest = load_manifest(out)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    assert manifest.tokenizer.kind == "words"
    assert manifest.train.documents + manifest.validation.documents == 60
    found = [
        tokenizer.decode(ids[1:])
        for split in ("train", "validation")
        for ids in read_token_documents(out / split, manifest.tokenizer.start_id)
    ]
    assert sorted(found) == sorted(example.text.strip() for _, example in training_examples(parse_tasks(spec)))
    texts = {example.text.strip(): example for _, example in training_examples(parse_tasks(spec))}
    for row in read_rows(out / "train"):
        # A document that continues in the next row is not compared.
        ends = row.document_lengths.cumsum()
        for begin, end in zip(ends - row.document_lengths, ends, strict=True):
            example = texts.get(tokenizer.decode(row.input_ids[begin + 1 : end]))
            if example is not None:
                answers = [1 + at for answer in example.answers for at in range(answer.begin, answer.end)]
                assert np.flatnonzero(row.loss_mask[begin:end]).tolist() == answers
    ids = tokenizer(" ".join(VOCABULARY), add_special_tokens=False)["input_ids"]
    assert sorted(ids) == list(range(2, 2 + len(VOCABULARY)))
    with pytest.raises(UserError, match="did you mean pairs"):
        prepare(PrepareOptions(source="recall:pears", out=tmp_path / "none"), quiet=True)
    with pytest.raises(UserError, match="--validation-source stdlib"):
        prepare(PrepareOptions(source="recall:pairs", validation_source="stdlib", out=tmp_path / "none"), quiet=True)


def test_the_loss_is_taken_over_the_answers(tmp_path):
    out = tmp_path / "out"
    spec = "pairs,queries=2,distance=3,documents=60"
    prepare(PrepareOptions(source=f"recall:{spec}+{spec},seed=1,learn=all", out=out, sequence_length=64), quiet=True)
    rows = read_rows(out / "train")
    batch = collate([encode_row(row) | {"row": number} for number, row in enumerate(rows)])
    loss_mask = torch.from_numpy(np.stack([row.loss_mask for row in rows]))
    assert torch.equal(batch.labels != IGNORE_INDEX, loss_mask)
    assert torch.equal(batch.labels[loss_mask], batch.input_ids[loss_mask])
    ends = [row.document_lengths.cumsum() for row in rows]
    parts = [part for row, end in zip(rows, ends, strict=True) for part in np.split(row.loss_mask, end)]
    complete = [part for part in parts if len(part) == 18]  # documents that are in a single row
    assert {part.sum() for part in complete} == {2, 18}


def test_loss_masks_of_tokens_and_of_rows_that_have_answers_in_part():
    offsets = [(0, 3), (3, 7), (7, 9), (9, 12)]
    assert answer_mask(offsets, [(3, 7), (10, 11)]).tolist() == [False, True, False, True]
    assert answer_mask(offsets, []).tolist() == [False] * 4
    packer = Packer(4, vocab_size=10, pad_id=0, has_loss_mask=True)
    rows = [*packer.add(np.arange(3), True, np.array([False, True, True])), *packer.add(np.arange(3), True)]
    rows += packer.finish()
    assert [row.loss_mask.tolist() for row in rows] == [[False, True, True, True], [True, True, False, False]]
