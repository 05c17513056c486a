"""Diagnostics of the memory: one warning for each problem, once it is one."""

import pytest
import torch

from infini_ds.config.recipe import load_recipe
from infini_ds.metrics.memory_diagnostics import MemoryDiagnostics, gate_metrics
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
    (warning,) = diagnostics.warnings(220, ALIKE | both)
    assert "the norm of M in layer_0 has grown from 5 to 55" in warning
    (warning,) = diagnostics.warnings(300, LOSS)
    assert "the memory raises the validation loss by 0.0100" in warning
    assert not diagnostics.warnings(400, LOSS)


def test_the_baseline_of_the_norms_survives_a_restart(tmp_path):
    """It is read from the metrics recorded so far."""
    recipe = load_recipe(None, [f"output={tmp_path}", "name=run", *CHOICES])
    writer = MetricWriter(recipe.folder, first_step=0)
    writer.record(50, dict.fromkeys(NORMS, 1.0))  # before the baseline
    writer.record(150, NORMS)
    writer.close()
    (warning,) = MemoryDiagnostics(recipe).warnings(500, {"memory/z_norm/layer_0": 71.0})
    assert "the norm of z in layer_0 has grown from 7 to 71" in warning


def test_gate_metrics():
    metrics = gate_metrics(torch.tensor([[0.001, 0.5], [0.75, 0.9995]]))
    assert metrics == {"memory/gate_spread": pytest.approx(0.9985), "memory/gates_pinned": 0.5}
