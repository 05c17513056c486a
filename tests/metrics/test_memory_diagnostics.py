"""Diagnostics of the memory: one warning for each problem, once it is one."""

import pytest
import torch

from infini_ds.config.recipe import load_recipe
from infini_ds.metrics.memory_diagnostics import MemoryDiagnostics, gate_metrics, hint_on_slow_gates
from infini_ds.metrics.metric_writers import MetricWriter

ALIKE = {"memory/gate_spread": 0.001, "memory/gates_pinned": 0.0}
NORMS = {"memory/M_norm/layer_0": 5.0, "memory/z_norm/layer_0": 7.0}
LOSS = {"validation/gained_by_memory": -0.01}
GAIN = {"validation/gained_by_memory": 0.01}
CHOICES = ["batch.rows=1", "steps=1000", "optimizer.gate_learning_rate=0.01"]


def test_each_problem_gets_one_warning():
    diagnostics = MemoryDiagnostics(load_recipe(None, ["output=/nowhere", *CHOICES]))
    assert not diagnostics.warnings(50, ALIKE | NORMS | LOSS)  # too early for any of them
    assert not diagnostics.warnings(150, {"memory/gate_spread": 0.2, "memory/gates_pinned": 0.25} | NORMS | GAIN)
    (warning,) = diagnostics.warnings(200, ALIKE | NORMS)
    assert "all gates are alike, within 0.0010" in warning
    assert not diagnostics.warnings(210, ALIKE | {name: 9 * norm for name, norm in NORMS.items()})
    both = {"memory/M_norm/layer_0": 55.0, "memory/M_norm/layer_1": 99.0}
    assert not diagnostics.warnings(290, both)  # at 145 steps, the half, nothing was recorded yet
    (warning,) = diagnostics.warnings(300, ALIKE | both)
    assert "the norm of M in layer_0 has grown from 5 to 55 since half as many steps" in warning
    (warning,) = diagnostics.warnings(300, LOSS)
    assert "the memory raises the validation loss by 0.0100" in warning
    assert not diagnostics.warnings(400, LOSS)


def test_gates_that_stay_near_their_start_get_a_hint():
    fixed = load_recipe(None, ["output=/nowhere", *CHOICES, "optimizer.gate_learning_rate=0"])
    short = load_recipe(None, ["output=/nowhere", *CHOICES, "steps=20", "schedule.warmup_steps=0"])
    assert hint_on_slow_gates(load_recipe(None, ["output=/nowhere", *CHOICES])) is None  # 1,000 steps of 0.01
    assert hint_on_slow_gates(fixed) is None
    hint = hint_on_slow_gates(short)
    assert hint and "at most in all 20 steps, so it stays near its start" in hint


# Norm of M in layer 0 in a run of 240 steps (width 128, rows of 2,048 tokens, AdamW), two CPU cores, every 10 steps
# from the end of the warm-up, 30, to 240. The values of that layer start small and grow while they are learned;
# documents at the end of rows differ in length.
RUN = ["output=/nowhere", "batch.rows=2", "steps=240", "schedule.warmup_steps=30", "optimizer.learning_rate=0.004"]
HEALTHY = [
    *(13054, 37746, 45621, 68676, 71135, 80617, 60869, 108043, 120725, 50403, 39001, 125658, 158917, 149156, 132082),
    *(187717, 189501, 135685, 179503, 190772, 197812, 211507),
]


def warnings_of(norms: list[float], *choices: str) -> list[str]:
    """Return the warnings of that run if its first layer has these norms."""
    diagnostics = MemoryDiagnostics(load_recipe(None, [*RUN, *choices]))
    steps = range(30, 10 * len(norms) + 30, 10)
    found = [
        diagnostics.warnings(step, {"memory/M_norm/layer_0": norm}) for step, norm in zip(steps, norms, strict=True)
    ]
    return [warning for warnings in found for warning in warnings]


def test_a_healthy_run_gets_no_warning():
    assert HEALTHY[-1] > 10 * HEALTHY[0]
    assert not warnings_of(HEALTHY)


def test_norms_that_vary_with_the_length_of_documents_get_no_warning():
    """As in packed rows, whose last document the memory holds."""
    varying = [50.0 if number % 2 else 1400.0 for number in range(len(HEALTHY))]
    assert len(varying) > 12 and not warnings_of(varying)


def test_a_norm_that_runs_away_is_warned_of_once():
    """From the middle of the run on it doubles every 20 steps."""
    run_away = [norm * 2 ** max(0, (number - 9) / 2) for number, norm in enumerate(HEALTHY)]
    (warning,) = warnings_of(run_away)
    assert "the norm of M in layer_0 has grown from" in warning and "lower optimizer.learning_rate=0.004, or" in warning
    assert (
        "lower optimizer.muon_learning_rate=0.02 and optimizer.learning_rate=0.004, or"
        in warnings_of(run_away, "optimizer.kind=muon", "optimizer.gradient_clipping=0")[0]
    )


def test_a_loss_within_the_noise_of_validation_is_no_warning():
    def warned(gain: float, error: float) -> list[str]:
        diagnostics = MemoryDiagnostics(load_recipe(None, ["output=/nowhere", *CHOICES]))
        return diagnostics.warnings(200, {"validation/gained_by_memory": gain, "validation/gain_standard_error": error})

    assert not warned(-0.00004, 0.0) and not warned(-0.01, 0.006)
    assert "by 0.0100" in warned(-0.01, 0.004)[0] and "by 0.0011" in warned(-0.0011, 0.0)[0]


def test_the_norms_survive_a_restart(tmp_path):
    """It is read from the metrics recorded so far."""
    recipe = load_recipe(None, [f"output={tmp_path}", "name=run", *CHOICES])
    writer = MetricWriter(recipe.folder, first_step=0)
    writer.record(50, dict.fromkeys(NORMS, 1.0))  # before the baseline
    writer.record(150, NORMS)
    writer.record(300, {name: 2 * norm for name, norm in NORMS.items()})
    writer.close()
    (warning,) = MemoryDiagnostics(recipe).warnings(500, {"memory/z_norm/layer_0": 71.0})
    assert "the norm of z in layer_0 has grown from 7 to 71" in warning  # at 150 steps: 250 is half


def test_gate_metrics():
    metrics = gate_metrics(torch.tensor([[0.001, 0.5], [0.75, 0.9995]]))
    assert metrics == {"memory/gate_spread": pytest.approx(0.9985), "memory/gates_pinned": 0.5}
