"""Statistics over seeds, the movement of gates, and the tables that hold a study's results."""

import csv
import math
from dataclasses import dataclass

import pytest
from harness import ROOT
from hypothesis import given
from hypothesis import strategies as st

from infini_ds.config.lr_schedule import gate_reach
from infini_ds.config.recipe import load_recipe
from infini_ds.evaluation.evaluation_file import Evaluation
from infini_ds.evaluation.model_loading import ModelFacts
from infini_ds.evaluation.task import TASKS, EvaluationTask, Headline, TaskResult, TidyRow
from infini_ds.study.collect import evaluation_values, gate_curves
from infini_ds.study.grid import expand
from infini_ds.study.results import (
    Measurement,
    RunInfo,
    RunResult,
    Spread,
    chance_of_disjoint_ranges,
    gate_movement,
    group_by_cell,
)
from infini_ds.study.results_csv import GATES, RESULTS, read_results, write_results
from infini_ds.study.study_config import load_study


def run_info(seed: int = 0, **fields) -> RunInfo:
    cell = "finetune-s32-c512-linear-constant"
    return RunInfo(f"{cell}-seed{seed}", cell, "finetune", "base", seed, 100, 32, 512, "linear", "constant", **fields)


def test_spread_over_seeds():
    one, other = Spread((1.0, 3.0)), Spread((3.5, 4.0))
    assert one.mean == 2 and one.deviation == pytest.approx(math.sqrt(2)) and Spread((1.0,)).deviation is None
    assert one.ranges_disjoint(other) and other.ranges_disjoint(one) and not one.ranges_disjoint(Spread((2.0, 5.0)))
    assert chance_of_disjoint_ranges(2, 2) == pytest.approx(1 / 3)
    assert chance_of_disjoint_ranges(5, 5) == pytest.approx(2 / 252)


@pytest.mark.parametrize(("until", "half"), [(100, 0.5), (50, 1.0)])
def test_gate_movement(until, half):
    """Two heads that move equally far, one up and one down; until the end, or until half of the steps."""
    keys = ["steps=100", "schedule.warmup_steps=0", "schedule.gates=constant", "optimizer.gate_learning_rate=0.01"]
    recipe = load_recipe(None, [*keys, "batch.rows=1"])
    limits = tuple(
        Measurement(step, 0, "gates", "on", "max_change", gate_reach(recipe, step), "") for step in (50, 100)
    )
    gates = {
        (0, head): [(step, 1 / (1 + math.exp(-sign * 0.02 * min(step, until)))) for step in range(101)]
        for head, sign in enumerate((1, -1))
    }
    moved = gate_movement(RunResult(run_info(), limits, gates))
    assert moved.net_change == pytest.approx(0.02 * until) and moved.path_length == pytest.approx(0.02 * until)
    assert moved.first_half_of_path == pytest.approx(half) and moved.max_change == pytest.approx(1.0)
    assert moved.first_half_of_learning_rate == pytest.approx(0.5)


def test_gate_curves_begin_where_the_earlier_run_ended(monkeypatch):
    """Or at gate_init, if there is no earlier run."""
    monkeypatch.chdir(ROOT)
    run = expand(load_study("launch/studies/small.yaml", ["recipe.model.gate_init=2.0"]))[0]
    metrics = [{"step": 5, "gate/layer_0/head_1": 0.8, "train/loss": 3.0}, {"step": 10, "gate/layer_0/head_1": 0.9}]
    start = RunResult(run_info(), (), {(0, 1): [(0, 0.5), (8, 0.7)]})
    assert gate_curves(run, metrics, start) == {(0, 1): [(0, 0.7), (5, 0.8), (10, 0.9)]}
    assert gate_curves(run, metrics, None)[0, 1][0] == (0, pytest.approx(1 / (1 + math.exp(-2.0))))


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=4))
def test_tables_keep_every_digit(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("tables")
    rows = tuple(Measurement(step, 7 * step, "blimp", "on", "accuracy", v, "ab") for step, v in enumerate(values))
    gates = {(1, 0): [(0, 0.5), (3, 1 / 3)]}
    results = [RunResult(run_info(seed, axes={"optimizer.eps": "1e-8"}), rows, gates) for seed in (0, 1)]
    write_results(results, folder)
    assert read_results(folder) == results
    assert [len(cell.results) for cell in group_by_cell(read_results(folder))] == [2]


def test_tables_are_tidy(tmp_path):
    """One row a value, and each row is found by its keys alone."""
    values = (Measurement(8, 64, "validation", setting, "loss", 2.5, "ab") for setting in ("on", "off"))
    write_results([RunResult(run_info(), tuple(values), {(0, 1): [(0, 0.5), (8, 0.6)]})], tmp_path)
    results, gates = (list(csv.DictReader((tmp_path / name).open())) for name in (RESULTS, GATES))
    keys = {(row["run"], row["step"], row["task"], row["setting"], row["metric"]) for row in results}
    assert len(results) == len(keys) == 2
    shared = {"arm": "finetune", "seed": "0", "segment_length": "32", "context_length": "512", "memory_rule": "linear"}
    assert shared.items() <= results[0].items() and results[0]["value"] == "2.5" and results[0]["sha256"] == "ab"
    assert gates[1] == {"run": run_info().run, "step": "8", "layer": "0", "head": "1", "gate": "0.6"}


@dataclass(frozen=True)
class WordsResult(TaskResult):
    losses: dict[str, float]

    def tidy_rows(self) -> list[TidyRow]:
        return [TidyRow(setting, "loss", loss) for setting, loss in self.losses.items()]


class Words(EvaluationTask[WordsResult]):
    """A task that the study knows nothing of."""

    name = "words"
    help = "loss on a list of words"
    result_type = WordsResult

    def run(self, model, context):
        raise NotImplementedError

    def headline(self, result):
        return Headline("loss", result.losses["on"])

    def table(self, result):
        raise NotImplementedError


def test_any_evaluation_task_becomes_rows(monkeypatch):
    monkeypatch.setitem(TASKS, "words", Words())
    model = ModelFacts("runs/tiny", "ab", 100, "infini_gpt_neo")
    evaluation = Evaluation(model, "", 0, {}).with_result("words", WordsResult({"on": 2.5, "off": 3.0}))
    assert list(evaluation_values(evaluation)) == [("words", "on", "loss", 2.5), ("words", "off", "loss", 3.0)]
