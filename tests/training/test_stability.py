"""Stability: real faults in a real run are seen by all ranks before the optimizer steps; skips, spikes, rollbacks."""

import json
import math
from pathlib import Path

import pytest
import torch
from faults import Fault, inject
from harness import SHAPE, STEPS, build, start_ranks

from infini_ds.checkpoint.manifest import TrainState, complete_checkpoints, read_manifest
from infini_ds.checkpoint.skip_records import Rollback, SkippedStep, read_rollbacks, read_skipped_steps
from infini_ds.data.batches import Batch
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.training.stability import update_loss_statistics
from infini_ds.utils.errors import UserError


def losses(run) -> list[float]:
    """The recorded losses, without those of empty or skipped steps."""
    found = [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]
    return [loss for loss in found if not math.isnan(loss)]


class Without:
    """A stream that lacks some batches, counted from 1."""

    def __init__(self, stream, left_out):
        self.stream, self.left_out, self.waited = stream, left_out, 0.0

    def __iter__(self):
        return (batch for number, batch in enumerate(self.stream, 1) if number not in self.left_out)

    def state_dict(self):
        return self.stream.state_dict()


@pytest.fixture
def pretrain(shards, tmp_path):
    """Train in this process: `pretrain(name, *overrides, fault=..., without=...)`; returns the run's folder."""

    def run(name, *overrides, fault=None, without=()) -> Path:
        trainer = build(f"data.path={shards}", f"output={tmp_path}", f"name={name}", *SHAPE, *STEPS, *overrides)
        if fault:
            inject(trainer, fault)
        if without:
            trainer.stream = Without(trainer.stream, without)
        assert trainer.fit()
        return tmp_path / name

    return run


@pytest.fixture(scope="module")
def batches(shards, tmp_path_factory) -> dict[int, Batch]:
    """The global batches that the tests' recipe sees, by step."""
    trainer = build(f"data.path={shards}", f"output={tmp_path_factory.mktemp('unused')}", *SHAPE, *STEPS)
    return dict(zip(range(1, 21), trainer.stream, strict=False))


STAGE_1 = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
AUTOCAST = STAGE_1 | {"zero_optimization": {"stage": 2}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


@pytest.mark.parametrize("kind", ["embedding", "loss"])
@pytest.mark.parametrize(
    ("precision", "own"),
    [("fp32", None), ("bf16", None), ("fp32", STAGE_1), ("bf16", STAGE_1), ("fp32", AUTOCAST)],
    ids=["fp32", "bf16", "fp32-stage1", "bf16-stage1", "autocast"],
)
def test_a_skipped_step_leaves_no_trace(kind, precision, own, pretrain, batches, tmp_path, capsys):
    """Not in the weights, the moments or the schedule: the losses are those of a run that never saw the batch."""
    choices = ["steps=8", "checkpoint.every=8", f"precision={precision}"]
    if own:
        (tmp_path / "own.json").write_text(json.dumps(own))
        choices.append(f"deepspeed={tmp_path / 'own.json'}")
    run = pretrain("faulty", *choices, fault=Fault(kind, batches[3].input_ids[1:2]))
    assert losses(run) == losses(pretrain("without", *choices, without=[3]))[:7]
    assert read_skipped_steps(run) == [SkippedStep(3, "loss", [0], [batches[3].row_numbers])]
    assert "step 3: the loss is non-finite on rank 0, so the step is skipped" in capsys.readouterr().out
    assert [
        line["stability/consecutive_skips"] for line in read_metrics(run) if "stability/consecutive_skips" in line
    ] == [1]
    assert read_metrics(run)[-1]["train/skipped_steps"] == 1


def test_two_ranks_roll_back_and_a_kill_during_it_changes_nothing(pretrain, shards, batches, tmp_path):
    """One row on one of two ranks in each of steps 6 and 7. Rollback to step 4, where both ranks die once the rows are
    written down; started again they skip the two batches.
    """
    bad = torch.cat([batches[6].input_ids[:1], batches[7].input_ids[3:]])
    choices = [*SHAPE, *STEPS, "batch.micro_rows=1", "checkpoint.every=4", "stability.max_consecutive_skips=2"]
    arguments = [str(tmp_path / "fault.pt"), f"data.path={shards}", f"output={tmp_path}", "name=two", *choices]
    outputs = []
    for dies, code in ((True, 9), (False, 0)):
        torch.save(Fault("embedding", bad, dies=dies), tmp_path / "fault.pt")
        ranks = start_ranks(2, *arguments, script="tests/support/faults.py")
        outputs.append([rank.communicate(timeout=240)[0] for rank in ranks])
        assert [rank.returncode for rank in ranks] == [code, code], outputs
    run = tmp_path / "two"
    skipped = read_skipped_steps(run)
    assert [(step.step, step.reason, len(step.ranks)) for step in skipped] == [(6, "loss", 1), (7, "loss", 1)]
    (rollback,) = read_rollbacks(run)
    rows = sorted(batches[6].row_numbers + batches[7].row_numbers)
    assert (rollback.from_step, rollback.to_step, rollback.rows) == (7, 4, rows)
    assert rows == sorted(row for step in skipped for of_rank in step.rows for row in of_rank)
    assert "resumed from" in outputs[1][0] and "step-000004: " in outputs[1][0]
    assert "step 6: all of its rows are skipped" in outputs[1][0]
    expected = losses(pretrain("without", without=[6, 7]))[:18]
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    log = (run / "train.log").read_text()
    assert log.count("rank 0 WARNING infini_ds.training.trainer: step 6: the loss is non-finite on rank ") == 1


def test_a_spike_is_flagged_or_rolled_back(pretrain, batches, capsys):
    fault = Fault("spike", batches[11].input_ids)
    choices = [
        "checkpoint.every=4",
        "stability.spike_window=5",
        "stability.spike_sigmas=4",
        "stability.spike_batches=2",
    ]
    flagged = pretrain("flagged", *choices, fault=fault)
    message = "step 11: the loss is"
    assert message in capsys.readouterr().out and len(losses(flagged)) == 20
    assert [line["step"] for line in read_metrics(flagged) if "stability/loss_spike" in line] == [11]
    assert not read_rollbacks(flagged)

    choices.append("data.workers=1")  # which has read ahead of where the run rolls back to
    run = pretrain("back", *choices, "stability.on_spike=roll_back", fault=fault)
    output = capsys.readouterr().out
    assert message in output and "rolled back from step 11 to 8, skipping 8 rows" in output
    assert losses(run) == losses(pretrain("without", *choices, without=[10, 11]))[:18]
    assert [step.reason for step in read_skipped_steps(run)] == ["spike"]


def test_a_run_that_rollbacks_do_not_help_ends(pretrain, tmp_path, capsys):
    """A learning rate so high that the first step ruins the weights."""
    choices = ["optimizer.learning_rate=1e30", "stability.max_consecutive_skips=3", "checkpoint.keep_last=1"]
    with pytest.raises(UserError, match=r"last 3 steps up to 4 .*, and no checkpoint from before exists"):
        pretrain("early", *choices, "checkpoint.every=20")
    with pytest.raises(UserError, match=r"last 3 steps up to 10 .*, after 2 rollbacks to step 1 .*: lower opt"):
        pretrain("diverged", *choices, "checkpoint.every=1")
    assert capsys.readouterr().out.count("rolled back from step") == 2
    assert len(read_rollbacks(tmp_path / "diverged")) == 2
    states = [read_manifest(checkpoint).state for checkpoint in complete_checkpoints(tmp_path / "diverged")]
    assert [state.consecutive_skips for state in states] == [0, 2]  # one to roll back to, and the last


def test_records_of_a_run_begun_before_are_read(pretrain, batches, tmp_path):
    """Files and keys of version 0.1: rows that the run skips so far stay skipped, and new lines go to new files."""
    run = tmp_path / "old"
    run.mkdir()
    rollback = {"from": 7, "back_to": 4, "why": "the loss spiked at step 7", "rows": batches[2].row_numbers}
    (run / "passed_over.jsonl").write_text(json.dumps(rollback) + "\n")
    step = {"step": 7, "reason": "spike", "ranks": [], "rows": [batches[2].row_numbers]}
    (run / "skipped.jsonl").write_text(json.dumps(step) + "\n")
    pretrain("old", "steps=5", "schedule.kind=constant", fault=Fault("loss", batches[4].input_ids[:1]))
    expected = pretrain("without", "steps=5", "schedule.kind=constant", without=[2, 4])
    assert losses(run) == losses(expected)[:3]
    assert [(step.step, step.reason) for step in read_skipped_steps(run)] == [(7, "spike"), (4, "loss")]
    assert read_rollbacks(run) == [Rollback(7, 4, "the loss spiked at step 7", batches[2].row_numbers)]
    assert len((run / "skipped.jsonl").read_text().splitlines()) == 1


def test_loss_statistics_equal_mean_and_variance_within_the_window():
    state, values = TrainState(), [3.0, 5.0, 4.0, 8.0]
    for value in values:
        update_loss_statistics(state, value, window=10)
    expected = torch.tensor(values, dtype=torch.float64)
    assert (state.losses, state.loss_mean) == (4, pytest.approx(expected.mean().item()))
    assert state.loss_variance == pytest.approx(expected.var(unbiased=False).item())
    before = state.loss_mean
    update_loss_statistics(state, 10.0, window=2)  # beyond the window a loss has a weight of 1/window
    assert state.loss_mean == pytest.approx((before + 10) / 2)
