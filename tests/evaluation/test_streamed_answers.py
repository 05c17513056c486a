"""Answers after a text that is read once, in pieces, against the complete row under each setting of the memory."""

from pathlib import Path

import pytest
import torch
from reference import TINY, random_ids, writer

from data_prep.tokenizer import make_word_tokenizer
from infini_ds.data.batches import pad_documents
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.scoring import greedy_answers
from infini_ds.evaluation.streamed_answers import (
    StreamedExample,
    answers_after_texts,
    batches_of_groups,
    score_streamed,
)

S = TINY["segment_length"]
SETTINGS = ("on", "off", "other")


def evaluated(model) -> EvaluatedModel:
    words = [str(number) for number in range(TINY["vocab_size"] - 2)]
    return EvaluatedModel("tiny", model, make_word_tokenizer(words), None, Path("none"), "")


def examples_of(model, segments: int, partners: list[int]) -> list[StreamedExample]:
    """Examples whose answers are what the model says with its memory on, off, swapped, or never, in turn."""
    found = []
    for number in range(len(partners)):
        length = 3 + number % 4  # of the question, so that some go on in a second segment
        found.append([random_ids(1, segments * S, seed=number)[0].tolist(), random_ids(1, length, seed=50 + number)])
    examples = []
    for number, (text, question) in enumerate(found):
        setting = SETTINGS[number % 3]
        answer: list[int] = []
        for _ in range(1 + number % 2):  # one or two tokens
            tail = question[0].tolist() + answer
            of_partner = found[partners[number]]
            rows = torch.tensor([text + tail, of_partner[0] + (of_partner[1][0].tolist() + [1] * 9)[: len(tail)]])
            swapped = {"memory_of": torch.tensor([1, 1])} if setting == "other" else {}
            with torch.no_grad():
                answer.append(int(model(rows, use_memory=setting != "off", **swapped).logits[0, -1].argmax()))
        if number % 7 == 6:
            answer[-1] = (answer[-1] + 1) % TINY["vocab_size"]
        examples.append(StreamedExample(text, question[0].tolist(), answer))
    return examples


@pytest.mark.parametrize("segments", [0, 1, 7])
@pytest.mark.parametrize("position_embedding", ["segment", "rotary"])
def test_streamed_answers_are_those_of_the_complete_text(segments, position_embedding, monkeypatch):
    monkeypatch.setattr("infini_ds.evaluation.generation.PIECE_TOKENS", 11 * 2 * S)
    model = writer(position_embedding=position_embedding)
    partners = [1, 0, 3, 2, 5, 4, 7, 6, 9, 10, 8]
    examples = examples_of(model, segments, partners)
    found = answers_after_texts(evaluated(model), examples, [2, 2, 2, 2, 3])
    for setting in SETTINGS:
        for number, example in enumerate(examples):
            row, other = ([token for part in examples[i] for token in part] for i in (number, partners[number]))
            pair = pad_documents([row, other])  # of one length, as `greedy_answers` wants them
            end = len(example.text) + len(example.question)
            spans = [[(end, end + len(example.answer))]]
            (want,) = greedy_answers(model, pair[:1], spans, setting, pair[1:] if setting == "other" else None)
            assert found[setting][number] == want[0], (setting, number)
    if segments:
        assert {setting: sum(found[setting]) for setting in SETTINGS} != dict.fromkeys(SETTINGS, sum(found["on"]))


def test_scores_do_not_depend_on_the_size_of_batches():
    model = evaluated(writer())
    examples = examples_of(model.model, 3, [1, 0, 3, 4, 2])
    scores = [score_streamed(model, examples.__getitem__, 5, batch_tokens) for batch_tokens in (1, 16 * S, 1000 * S)]
    assert scores[0] == scores[1] == scores[2] and len(scores[0].data) == 64
    assert scores[0].answers == 5 and scores[0].tokens == max(sum(map(len, e)) for e in examples)
    assert set(scores[0].accuracy) == set(SETTINGS) and 0 < scores[0].accuracy["on"] < 1


@pytest.mark.parametrize("examples", [2, 3, 8, 9])
@pytest.mark.parametrize("rows", [0, 3, 4, 100])
def test_groups_are_the_same_whatever_the_batch(examples, rows):
    batches = batches_of_groups(examples, rows)
    groups = [group for batch in batches for group in batch]
    assert [number for group in groups for number in group] == list(range(examples))
    assert {len(group) for group in groups} <= {2, 3} and groups == batches_of_groups(examples, 1000)[0]
    assert all(len(batch) == 1 or sum(map(len, batch)) <= rows for batch in batches)


def test_a_text_is_computed_once_for_all_settings():
    model, counts = writer(), []
    examples = examples_of(model, 9, [1, 0])
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].numel()))
    answers_after_texts(evaluated(model), examples, [2])
    assert counts[0] == 2 * 9 * S and sum(counts[1:]) <= 4 * 2 * 2 * S, "the text, and a question in three settings"
