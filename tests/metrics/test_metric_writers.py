"""Metric files: what is written, what a resumed run keeps, what a killed run leaves."""

import json

import torch
from reference import tiny_model

from infini_ds.metrics.metric_writers import FILE, MetricWriter, gates, memory_metrics, read_metrics


def write(run, first_step, *lines):
    writer = MetricWriter(run, first_step)
    for step, value in lines:
        writer.record(step, {"train/loss": value})
    writer.close()


def test_a_resumed_run_replaces_later_steps(tmp_path):
    write(tmp_path, 0, (1, 5.0), (2, 4.0), (3, 3.0))
    write(tmp_path, 2, (3, 3.5))
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [(1, 5.0), (2, 4.0), (3, 3.5)]
    write(tmp_path, 0, (1, 6.0))
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [(1, 6.0)]


def test_an_incomplete_last_line_is_left_out(tmp_path):
    write(tmp_path, 0, (1, 5.0))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 2, "train/lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert read_metrics(tmp_path / "nowhere") == []


def test_metrics_of_an_earlier_version_are_read(tmp_path):
    """A line as version 0.1 wrote it."""
    line = {"step": 5, "train/loss": 8.1, "train/skipped_steps": 0, "memory/gates_pinned": 0.0, "speed/mfu": 0.1}
    (tmp_path / FILE).write_text(json.dumps(line) + "\n")
    write(tmp_path, 5, (10, 7.0))
    assert read_metrics(tmp_path) == [line, {"step": 10, "train/loss": 7.0}]


def test_memory_metrics_average_over_rows_and_heads():
    model = tiny_model()
    memory = model(torch.randint(1, 19, (2, 12))).memory
    metrics = memory_metrics(model, memory)
    for layer, state in enumerate(memory):
        M, z = (torch.stack([x.norm() for row in tensor for x in row]).mean().item() for tensor in (state.M, state.z))
        assert abs(metrics[f"memory/M_norm/layer_{layer}"] - M) < 1e-6
        assert abs(metrics[f"memory/z_norm/layer_{layer}"] - z) < 1e-6
        for head, gate in enumerate(gates(model)[layer].tolist()):
            assert metrics[f"gate/layer_{layer}/head_{head}"] == gate
