"""evaluation.json as version 0.1 wrote it is read into today's results."""

import json

from infini_ds.evaluation.evaluation_file import read_evaluation, start_evaluation
from infini_ds.evaluation.model_loading import ModelFacts
from infini_ds.evaluation.task import TASKS, TidyRow

# Shortened lists; the keys are complete.
SETTING = {
    "loss": 6.25,
    "perplexity": 518.0,
    "tokens": 130_000,
    "by_segment": {"loss": [6.5, 6.0], "perplexity": [665.1, 403.4]},
    "by_position": {"position": [4.0, 12.0], "loss": [6.5, 6.0]},
    "within_segment": {"loss": [6.25]},
    "by_row": [6.25],
}
ENTRY = {"command": "python launch/evaluate.py runs/tiny", "seed": 0}
DATA = {"path": "data/stdlib", "sha256": "ab" * 32}
WRITTEN = {
    "model": {"path": "runs/tiny", "sha256": "cd" * 32, "parameters": 1_400_000, "model_type": "infini_gpt_neo"},
    "command": "python launch/evaluate.py runs/tiny",
    "seed": 0,
    "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "4.57.6"},
    "tasks": {
        "position": ENTRY
        | {
            "data": DATA,
            "rows": 1,
            "sequence_length": 2048,
            "segment_length": 1024,
            "memory": {"on": SETTING, "off": SETTING | {"loss": 6.5}},
            "gained": {"off": {"mean": 0.25, "standard_error": None}},
        },
        "recall": ENTRY
        | {
            "tasks": {
                "variables": {
                    "chance": 0.03125,
                    "points": [
                        {
                            "segments": 4,
                            "depth": 0.0,
                            "tokens": 300,
                            "answers": 64,
                            "accuracy": {"on": 0.5, "off": 0.0},
                            "data": "ef" * 32,
                        }
                    ],
                }
            },
            "examples": 64,
            "segment_length": 64,
            "data": DATA,
        },
        "blimp": ENTRY
        | {
            "accuracy": 0.5,
            "phenomena": {"islands": 0.5},
            "paradigms": {"adjunct_island": {"accuracy": 0.5, "pairs": 1000, "phenomenon": "islands"}},
            "data": DATA,
        },
        "glue": ENTRY
        | {
            "mean": 0.75,
            "tasks": {
                "mnli": {
                    "metric": "accuracy",
                    "value": 0.75,
                    "accuracy": 0.75,  # no F1 and no Matthews' correlation, with three classes
                    "step": 200,
                    "majority": 0.375,
                    "train": 1000,
                    "validation": 100,
                    "classes": 3,
                }
            },
            "settings": {
                "learning_rate": 5e-5,
                "batch": 64,
                "epochs": 10,
                "patience": 10,
                "evaluate_every": 200,
                "max_length": 128,
            },
            "limit": None,
            "data": DATA,
        },
        "of_another_version": ENTRY | {"score": 1},
    },
}


def test_results_of_an_earlier_version_are_read(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps(WRITTEN))
    evaluation = read_evaluation(tmp_path)
    assert evaluation.model.parameters == 1_400_000
    found = {name: evaluation.result(name) for name in TASKS if name in WRITTEN["tasks"]}
    assert {name: TASKS[name].headline(result) for name, result in found.items()} == {
        "position": ("loss", 6.25),
        "recall": ("mean_accuracy", 0.5),
        "blimp": ("accuracy", 0.5),
        "glue": ("mean", 0.75),
    }
    assert found["position"].tidy_rows()[3:] == [
        TidyRow("off", "loss", 6.5),
        TidyRow("off", "gain", 0.25),
        TidyRow("off", "loss/segment_1", 6.5),
        TidyRow("off", "loss/segment_2", 6.0),
    ]
    assert found["recall"].tidy_rows()[1:] == [
        TidyRow("on", "accuracy/variables/4_segments/depth_0", 0.5),
        TidyRow("off", "accuracy/variables/4_segments/depth_0", 0.0),
    ]
    assert found["glue"].tidy_rows() == [
        TidyRow("on", "mean", 0.75),
        TidyRow("on", "accuracy/mnli", 0.75),
    ]
    for name, result in found.items():
        assert TASKS[name].table(result) is not None
        TASKS[name].plot(result, tmp_path)
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000


def test_results_are_kept_for_the_same_model_only(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps(WRITTEN))
    same = ModelFacts(**WRITTEN["model"])
    other = ModelFacts("runs/other", "01" * 32, 1, "gpt2")
    assert start_evaluation(tmp_path, same, "command", 1).tasks == WRITTEN["tasks"], "also of tasks that are unknown"
    assert start_evaluation(tmp_path, other, "command", 1).tasks == {}
    assert start_evaluation(tmp_path / "nothing", same, "command", 1).tasks == {}
