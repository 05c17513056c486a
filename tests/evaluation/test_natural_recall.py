"""Natural recall: distances of repeated bigrams against a dictionary, losses against each row alone, the gain."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from harness import call_script

from infini_ds.config.training_data import find_sources
from infini_ds.data.batches import collate
from infini_ds.data.streams import ValidationRows
from infini_ds.evaluation.evaluation_file import read_evaluation
from infini_ds.evaluation.model_loading import load_evaluated_model
from infini_ds.evaluation.result_cache import ResultCache
from infini_ds.evaluation.task import TASKS, EvaluationContext
from infini_ds.evaluation.tasks.natural_recall import (
    bigram_distances,
    classes_of_distances,
    distances_of_class,
    evaluate_natural_recall,
    summarize,
)
from infini_ds.evaluation.tasks.position import evaluate_position
from infini_ds.evaluation.validation_rows import choose_rows, rows_of_options
from infini_ds.utils.errors import UserError

CPU = torch.device("cpu")


def reference_distances(ids: list[int], documents: list[int], S: int) -> list[int | None]:
    """For each token after the first: segments since its bigram occurred, -1 for never, None without a bigram."""
    found: list[int | None] = []
    last: dict[tuple[int, int, int], int] = {}
    for t in range(1, len(ids)):
        if documents[t] != documents[t - 1]:
            found.append(None)
            continue
        bigram = (documents[t], ids[t - 1], ids[t])
        found.append(t // S - last[bigram] // S if bigram in last else -1)
        last[bigram] = t
    return found


@pytest.mark.parametrize("S", [1, 3, 8, 100])
@pytest.mark.parametrize("vocabulary", [1, 3, 50_000])
def test_distances_are_those_of_a_dictionary(S, vocabulary):
    generator = torch.Generator().manual_seed(S)
    ids = torch.randint(0, vocabulary, (4, 97), generator=generator)
    ids[:, 50:] = ids[:, :47]  # so that a large vocabulary repeats bigrams, too
    documents = torch.stack([(torch.arange(97) >= 40) * d + (torch.arange(97) >= 43) * d for d in (0, 1, 1, 2)])
    distances, inside = bigram_distances(ids, documents, S)
    for b in range(4):
        want = reference_distances(ids[b].tolist(), documents[b].tolist(), S)
        assert inside[b].tolist() == [distance is not None for distance in want]
        assert [d for d, i in zip(distances[b].tolist(), inside[b].tolist(), strict=True) if i] == [
            distance for distance in want if distance is not None
        ]
    assert distances.max() > 0 or S == 100


def test_classes_are_octaves():
    distances = torch.arange(-1, 40)
    classes = classes_of_distances(distances).tolist()
    assert classes[:11] == [0, 1, 2, 3, 4, 4, 5, 5, 5, 5, 6]
    for number in set(classes) - {0}:
        nearest, farthest = distances_of_class(number)
        inside = [d for d, c in zip(distances.tolist(), classes, strict=True) if c == number]
        assert inside[0] == nearest and (inside[-1] == farthest or number == max(classes))


def test_a_gain_is_that_of_all_tokens_with_its_error_over_rows():
    tokens = torch.tensor([[2.0, 4.0], [0.0, 2.0], [1.0, 6.0]])
    losses = {"on": tokens * 1.0, "off": tokens * torch.tensor([[9.0, 1.5], [9.0, 1.0], [9.0, 2.0]])}
    found = summarize(tokens, losses, [1], 1, 1)
    assert found.tokens == 12 and found.loss == {"on": 1.0, "off": pytest.approx((6 + 2 + 12) / 12)}
    mean = 8 / 12
    residuals = [2 - 4 * mean, 0 - 2 * mean, 6 - 6 * mean]
    assert found.gained["off"].mean == pytest.approx(mean)
    assert found.gained["off"].standard_error == pytest.approx(math.sqrt(sum(r * r for r in residuals) * 3 / 2) / 12)


@pytest.fixture(scope="module")
def measured(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("natural")
    done = call_script("launch/evaluate.py", runs / "one", "--tasks", "natural_recall", "--rows", "5", "--out", out)
    return out, json.loads((out / "evaluation.json").read_text())["tasks"]["natural_recall"], done.stdout


def test_losses_are_those_of_the_tokens_row_by_row(measured, runs, shards):
    _, found, _ = measured
    rows = ValidationRows(find_sources(str(shards), [], ""))
    model, S = load_evaluated_model(str(runs / "one"), CPU).model, found["segment_length"]
    for setting, use_memory in (("on", True), ("off", False)):
        by_distance: dict[int, list[float]] = {}
        for i in range(5):
            batch = collate([rows[i * len(rows) // 5]])
            (inputs,) = batch.micro_batches(1, CPU)
            with torch.no_grad():
                losses = model(**inputs, use_memory=use_memory, loss_reduction="none").loss[0]
            documents, ids = batch.full_document_ids()[0].tolist(), batch.input_ids[0].tolist()
            for t, distance in enumerate(reference_distances(ids, documents, S), start=1):
                if distance is not None and batch.labels[0, t] != -100:
                    by_distance.setdefault(distance, []).append(losses[t - 1].item())
        for group in (found["new"], *found["seen"], found["remembered"]):
            nearest, farthest = (-1, -1) if group["nearest"] is None else (group["nearest"], group["farthest"])
            some = [loss for d in range(nearest, farthest + 1) for loss in by_distance.get(d, [])]
            assert group["tokens"] == len(some)
            assert group["loss"][setting] == pytest.approx(sum(some) / len(some), abs=1e-5)
    assert found["seen"][0]["nearest"] == 0 and found["seen"][-1]["farthest"] == 8
    assert sum(group["tokens"] for group in found["seen"][1:]) == found["remembered"]["tokens"]


def test_table_plot_headline_and_tidy_rows(measured):
    out, found, shown = measured
    assert "natural recall: 5 rows of 256 tokens, segments of 32" in shown
    assert (out / "natural_recall.png").stat().st_size > 10_000
    result = read_evaluation(out).result("natural_recall")
    headline = TASKS["natural_recall"].headline(result)
    rows = {row[:2]: row.value for row in result.tidy_rows()}
    assert headline == ("loss/remembered", found["remembered"]["loss"]["on"])
    assert rows["on", headline.name] == headline.value
    assert rows["off", "gain/2_segments"] == pytest.approx(
        found["seen"][2]["loss"]["off"] - found["seen"][2]["loss"]["on"], abs=1e-9
    )
    assert set(found["new"]["loss"]) == {"on", "off", "other"}


def test_an_external_model_is_a_baseline(gpt2, shards, tmp_path):
    options = ["--tasks", "natural_recall", "--data", shards, "--rows", "2", "--out", tmp_path]
    done = call_script("launch/evaluate.py", gpt2, *options)
    found = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]["natural_recall"]
    assert list(found["new"]["loss"]) == ["on"] and found["new"]["gained"] == {} and "memory off" not in done.stdout


def test_rows_of_a_single_segment_are_refused(runs, shards, tmp_path):
    model = load_evaluated_model(str(runs / "one"), CPU)
    model.model.config.segment_length = 256
    rows = choose_rows(model, find_sources(str(shards), [], ""), 2)
    context = EvaluationContext(ResultCache(tmp_path, ""), SimpleNamespace(), seed=0, limit=None, batch_tokens=256)
    with pytest.raises(
        UserError, match=r"no bigram of the 2 rows is repeated after a segment of 256 tokens: .*segment-tokens"
    ):
        evaluate_natural_recall(rows, context)


def test_segment_tokens_group_models_of_other_segments_alike(runs, shards, tmp_path):
    """So that full attention, one segment a row, stands beside a memory: the same tokens at the same distances."""
    model = load_evaluated_model(str(runs / "one"), CPU)
    context = EvaluationContext(ResultCache(tmp_path, ""), SimpleNamespace(), seed=0, limit=None, batch_tokens=256)
    options = SimpleNamespace(data=str(shards), rows=2, segment_tokens=0)
    usual = evaluate_natural_recall(rows_of_options(model, options), context)
    options.segment_tokens = model.model.config.segment_length
    model.model.config.segment_length = 256
    full = evaluate_natural_recall(rows_of_options(model, options), context)
    assert full.segment_length == usual.segment_length == 32
    for one, other in zip((full.new, *full.seen), (usual.new, *usual.seen), strict=True):
        assert (one.nearest, one.farthest, one.tokens) == (other.nearest, other.farthest, other.tokens)
    positions = evaluate_position(rows_of_options(model, options), context)
    assert len(positions.memory["on"].by_segment.loss) == 256 // 32
