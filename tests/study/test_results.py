"""Statistics over seeds, the movement of gates, and the tables that hold a study's results."""

import csv
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infini_ds.config.lr_schedule import gate_reach
from infini_ds.config.recipe import load_recipe
from infini_ds.study.collect import evaluation_values
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


def test_evaluations_become_rows():
    position = {"loss": 2.0, "by_segment": {"loss": [2.5, 1.5]}}
    tasks = {
        "position": {"memory": {"on": position, "off": position}},
        "blimp": {"accuracy": 0.6, "paradigms": {"a": {"pairs": 40}, "b": {"pairs": 2}}, "phenomena": {"islands": 0.7}},
        "glue": {"mean": 0.5, "tasks": {"mrpc": {"metric": "f1", "value": 0.8}}},
        "recall": {"tasks": {"passkey": {"points": [{"segments": 4, "depth": 0.25, "accuracy": {"on": 1.0}}]}}},
    }
    rows = {(task, setting, metric): value for task, setting, metric, value in evaluation_values(tasks)}
    assert rows["position", "off", "loss/segment_2"] == 1.5 and rows["position", "on", "loss"] == 2.0
    assert rows["blimp", "on", "accuracy"] == 0.6 and rows["blimp", "on", "pairs"] == 42
    assert rows["blimp", "on", "accuracy/islands"] == 0.7
    assert rows["glue", "on", "mean"] == 0.5 and rows["glue", "on", "f1/mrpc"] == 0.8
    assert rows["recall", "on", "accuracy/passkey/4_segments/depth_0.25"] == 1.0
