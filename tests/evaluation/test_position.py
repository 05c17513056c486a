"""Loss by position, against plain computations row by row."""

import math

import pytest
import torch

from infini_ds.config.training_data import find_sources
from infini_ds.data.batches import collate
from infini_ds.data.streams import ValidationRows
from infini_ds.evaluation.model_loading import load_evaluated_model
from infini_ds.evaluation.result_cache import ResultCache
from infini_ds.evaluation.task import EvaluationContext
from infini_ds.evaluation.tasks.position import evaluate_position
from infini_ds.evaluation.validation_rows import choose_rows, find_partners
from infini_ds.training.validation import position_losses
from infini_ds.utils.errors import UserError

CPU = torch.device("cpu")


def context(folder, batch_tokens: int) -> EvaluationContext:
    return EvaluationContext(ResultCache(folder, ""), None, seed=0, limit=None, batch_tokens=batch_tokens)


def test_losses_are_those_of_each_row_alone(tasks, runs, shards):
    found = tasks["position"]
    rows = ValidationRows(find_sources(str(shards), [], ""))
    chosen = [rows[i * len(rows) // 5] for i in range(5)]
    model = load_evaluated_model(str(runs / "one"), CPU).model
    S = found["segment_length"]
    for memory, use_memory in (("on", True), ("off", False)):
        losses, labels = [], []
        for row in chosen:
            batch = collate([row])
            (inputs,) = batch.micro_batches(1, CPU)
            losses.append(model(**inputs, use_memory=use_memory, loss_reduction="none").loss[0].detach())
            labels.append(batch.labels[0, 1:] != -100)
        losses, counted = torch.stack(losses).double(), torch.stack(labels)
        measured = found["memory"][memory]
        assert measured["loss"] == pytest.approx((losses.sum() / counted.sum()).item(), abs=1e-5)
        assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))
        third = slice(2 * S, 3 * S)
        mean = losses[:, third].sum() / counted[:, third].sum()
        assert measured["by_segment"]["loss"][2] == pytest.approx(mean.item(), abs=1e-5)
        fifth_places = losses[:, S + 4 :: S].sum() / counted[:, S + 4 :: S].sum()
        assert measured["within_segment"]["loss"][4] == pytest.approx(fifth_places.item(), abs=1e-5)
        assert measured["by_row"] == pytest.approx((losses.sum(1) / counted.sum(1)).tolist(), abs=1e-5)
    gains = torch.tensor(found["memory"]["off"]["by_row"]) - torch.tensor(found["memory"]["on"]["by_row"])
    assert found["gained"]["off"]["mean"] == pytest.approx(gains.mean().item(), abs=1e-6)


def test_all_rows_are_what_training_validates_on(runs, shards, tmp_path):
    sources = find_sources(str(shards), [], "")
    model = load_evaluated_model(str(runs / "one"), CPU)
    found = evaluate_position(choose_rows(model, sources, None), context(tmp_path, 2048))
    expected = position_losses(model.model, ValidationRows(sources), None, 8)
    assert found.memory["on"].loss == pytest.approx(expected.mean, abs=1e-5)
    assert found.memory["on"].tokens == int(expected.count.sum())


def test_rows_of_another_tokenizer_are_refused(exported, shards, tmp_path):
    model = load_evaluated_model(str(exported), CPU)
    vocabulary = dict(model.tokenizer.get_vocab())
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    model.tokenizer.get_vocab = lambda: vocabulary
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate_position(choose_rows(model, find_sources(str(shards), [], ""), 1), context(tmp_path, 1))


def test_more_tokens_in_the_model_than_in_the_rows_are_no_mistake(exported, shards, tmp_path):
    model = load_evaluated_model(str(exported), CPU)
    model.tokenizer.add_tokens(["newword"])
    assert evaluate_position(choose_rows(model, find_sources(str(shards), [], ""), 1), context(tmp_path, 1)).rows == 1


def test_partners_share_no_document(shards):
    rows = ValidationRows(find_sources(str(shards), [], ""))
    number, expected = -1, []
    for i in range(len(rows)):  # one source, so in the order of the split
        row, first = rows[i], None
        at = 0
        for length in row["document_lengths"]:
            if at or row["input_ids"][0] == 0 or number < 0:
                number += 1
            first = number if first is None else first
            at += length
        expected.append((first, number))
    documents = rows.documents(0)
    assert documents == expected and documents[-1][1] > 3
    for row, partner in enumerate(find_partners(list(range(len(rows))), documents)):
        (a, b), (c, d) = documents[row], documents[partner]
        assert not set(range(a, b + 1)) & set(range(c, d + 1))
    assert find_partners([0, 1], [(0, 0), (0, 2), (2, 2)]) is None
