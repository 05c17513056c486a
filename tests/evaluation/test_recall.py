"""The recall task: distances in segments, and what its result holds."""

import hashlib
from functools import partial

import torch

from data_prep.synthetic.tasks import evaluation_seed
from infini_ds.evaluation.model_loading import load_evaluated_model
from infini_ds.evaluation.tasks.recall import points_of


def test_segments_lie_between_fact_and_question(exported):
    model = load_evaluated_model(str(exported), torch.device("cpu"))
    S = model.model.config.segment_length

    def tokenize(text: str) -> list[int]:
        return model.tokenizer.encode(text, add_special_tokens=False)

    points = list(points_of("passkey", [0, 2, 8], S))
    assert [(p.segments, p.depth) for p in points[:3]] == [(0, 0.0), (2, 0.0), (2, 0.25)] and len(points) == 11
    for point in points + list(points_of("pairs,queries=3", [4], S)):
        example = point.task.example(0, 0, tokenize)
        distance = round((1 - point.depth) * point.segments * S)
        if point.name == "passkey":
            assert example.answers[0].distance == distance
        else:
            assert min(answer.distance for answer in example.answers) >= distance


def test_no_example_is_one_that_a_source_writes(tasks, exported):
    """Whose facts a model may have been trained on: with the same options and the seed of both, 0 by default."""
    tokenizer = load_evaluated_model(str(exported), torch.device("cpu")).tokenizer

    def texts(seed: int) -> list[str]:
        (task,) = (point.task for point in points_of("pairs,queries=2", [0], 1))
        tokenize = partial(tokenizer.encode, add_special_tokens=False)
        return [task.example(seed, index, tokenize).text for index in range(3)]

    (data, *_) = (point["data"] for point in tasks["recall"]["tasks"]["pairs,queries=2"]["points"])
    assert data != hashlib.sha256("\n".join(texts(0)).encode()).hexdigest()
    assert data == hashlib.sha256("\n".join(texts(evaluation_seed(0))).encode()).hexdigest()


def test_results_have_answers_settings_and_chance(tasks):
    found = tasks["recall"]
    assert found["tasks"]["pairs,queries=2"]["chance"] == 1 / 32
    assert [point["answers"] for point in found["tasks"]["pairs,queries=2"]["points"]] == [6, 6]
    for point in found["tasks"]["passkey,digits=2"]["points"]:
        assert set(point["accuracy"]) == {"on", "off", "other"} and point["answers"] == 3
