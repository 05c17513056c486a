"""Guards: faults that are really there are seen by all ranks before the optimizer steps, and passed over."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from faults import Fault, inject
from harness import SHAPE, STEPS, start_ranks

from infini_ds.checkpoint.manifest import complete_checkpoints, read_manifest
from infini_ds.config.recipe import load_recipe
from infini_ds.data.batches import Batch
from infini_ds.distributed.environment import detect_environment
from infini_ds.metrics.memory_diagnostics import MemoryDiagnostics
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.training import gradient_check
from infini_ds.training.setup import set_up
from infini_ds.training.trainer import train
from infini_ds.utils.errors import UserError


def losses(run) -> list[float]:
    """Of the steps that were made."""
    found = [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]
    return [loss for loss in found if not math.isnan(loss)]


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Without:
    """A stream that lacks some batches, counted from 1."""

    def __init__(self, stream, batches):
        self.whole, self.left_out, self.waited = stream, batches, 0.0

    def __iter__(self):
        return (batch for number, batch in enumerate(self.whole, 1) if number not in self.left_out)

    def state_dict(self):
        return self.whole.state_dict()


@pytest.fixture
def pretrain(shards, tmp_path):
    """Train in this process: `pretrain(name, *overrides, fault=..., without=...)`; returns the run's folder."""

    def run(name, *overrides, fault=None, without=()):
        where = [f"data.path={shards}", f"output={tmp_path}", f"name={name}"]
        training = set_up(load_recipe(None, [*where, *SHAPE, *STEPS, *overrides]), detect_environment())
        if fault:
            inject(training, fault)
        if without:
            training.stream = Without(training.stream, without)
        assert train(training)
        return tmp_path / name

    return run


@pytest.fixture(scope="module")
def batches(shards, tmp_path_factory) -> dict[int, Batch]:
    """The global batches that the tests' recipe sees, by step."""
    where = [f"data.path={shards}", f"output={tmp_path_factory.mktemp('unused')}"]
    training = set_up(load_recipe(None, [*where, *SHAPE, *STEPS]), detect_environment())
    return dict(zip(range(1, 21), training.stream, strict=False))


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
    rows = batches[3].row_numbers
    assert lines(run / "skipped.jsonl") == [{"step": 3, "reason": "loss", "ranks": [0], "rows": [rows]}]
    assert "step 3: the loss was not finite on rank 0, the step was skipped" in capsys.readouterr().out
    assert [
        line["stability/consecutive_skips"] for line in read_metrics(run) if "stability/consecutive_skips" in line
    ] == [1]
    assert read_metrics(run)[-1]["train/skipped_steps"] == 1


def test_two_ranks_go_back_and_a_kill_in_it_changes_nothing(pretrain, shards, batches, tmp_path):
    """One row on one of two ranks in each of steps 6 and 7. Back to step 4, where both ranks die once the rows are
    written down; started again they pass over the two batches.
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
    skipped = lines(run / "skipped.jsonl")
    assert [(line["step"], line["reason"]) for line in skipped] == [(6, "loss"), (7, "loss")]
    assert [len(line["ranks"]) for line in skipped] == [1, 1]
    (passed_over,) = lines(run / "passed_over.jsonl")
    rows = batches[6].row_numbers + batches[7].row_numbers
    assert (passed_over["from"], passed_over["back_to"]) == (7, 4)
    assert (
        passed_over["rows"]
        == sorted(rows)
        == sorted(row for line in skipped for of_rank in line["rows"] for row in of_rank)
    )
    assert "step-000004: " in outputs[1][0] and "step 6: all of its rows are passed over" in outputs[1][0]
    expected = losses(pretrain("without", without=[6, 7]))[:18]
    assert losses(run) == pytest.approx(expected, abs=1e-5)


def test_a_spike_is_flagged_or_passed_over(pretrain, batches, capsys):
    fault = Fault("spike", batches[11].input_ids)
    choices = [
        "checkpoint.every=4",
        "stability.spike_window=5",
        "stability.spike_sigmas=4",
        "stability.spike_batches=2",
    ]
    flagged = pretrain("flagged", *choices, fault=fault)
    said = "step 11: the loss is"
    assert said in capsys.readouterr().out and len(losses(flagged)) == 20
    assert [line["step"] for line in read_metrics(flagged) if "stability/loss_spike" in line] == [11]
    assert not (flagged / "passed_over.jsonl").exists()

    choices.append("data.workers=1")  # which has read ahead of where the run goes back
    run = pretrain("back", *choices, "stability.on_spike=roll_back", fault=fault)
    output = capsys.readouterr().out
    assert said in output and "goes back from step 11 to 8 and passes over 8 rows" in output
    assert losses(run) == losses(pretrain("without", *choices, without=[10, 11]))[:18]


def test_a_run_that_going_back_does_not_help_ends(pretrain, tmp_path, capsys):
    """A learning rate so high that the first step ruins the weights."""
    choices = ["optimizer.learning_rate=1e30", "stability.max_consecutive_skips=3", "checkpoint.keep_last=1"]
    with pytest.raises(UserError, match=r"last 3 steps up to 4 .*, and there is no checkpoint from before"):
        pretrain("early", *choices, "checkpoint.every=20")
    with pytest.raises(UserError, match=r"last 3 steps up to 10 .*, after going back to step 1 2 times .*: lower opt"):
        pretrain("diverged", *choices, "checkpoint.every=1")
    assert capsys.readouterr().out.count("the run goes back from step") == 2
    assert len(lines(tmp_path / "diverged" / "passed_over.jsonl")) == 2
    states = [read_manifest(checkpoint).state for checkpoint in complete_checkpoints(tmp_path / "diverged")]
    assert [state.consecutive_skips for state in states] == [0, 2]  # one to go back to, and the last


def test_a_wrong_gradient_on_one_of_two_ranks_ends_the_run(shards, tmp_path):
    torch.save(Fault("gradient", rank=1), tmp_path / "fault.pt")
    arguments = [str(tmp_path / "fault.pt"), f"data.path={shards}", f"output={tmp_path}", "name=wrong", *SHAPE, *STEPS]
    ranks = start_ranks(2, *arguments, script="tests/support/faults.py")
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert ranks[0].returncode == 2, outputs
    assert "summed up for transformer.h.1.ln_1.weight differs from an unsharded recompute by 0.0" in outputs[0]
    assert "(1 of " in outputs[0]


@pytest.mark.parametrize("blocks", [[], ["model.segments_per_block=2", "model.gradient_checkpointing=true"]])
def test_dropout_falls_the_same_in_the_recompute(blocks, pretrain, monkeypatch):
    dropout = [f"model.config.{place}_dropout=0.2" for place in ("attention", "embed", "resid")]
    pretrain("dropout", "steps=4", *dropout, *blocks)
    monkeypatch.setattr(gradient_check, "set_rng_states", lambda states: None)
    with pytest.raises(UserError, match=r"differs from an unsharded recompute by .* \(32 of 32 parameters do\)"):
        pretrain("other", "steps=4", *dropout, *blocks)


def test_the_memory_in_bad_health_gets_one_sentence(pretrain, capsys):
    pretrain("pinned", "optimizer.gate_learning_rate=2", "steps=10")
    output = capsys.readouterr().out
    assert output.count("of the gates are within 0.01 of 0 or 1, where they hardly learn: lower") == 1

    recipe = load_recipe(None, ["output=/nowhere", "batch.rows=1", "steps=1000", "optimizer.gate_learning_rate=0.01"])
    health = MemoryDiagnostics(recipe)
    alike = {"memory/gate_spread": 0.001, "memory/gates_pinned": 0.0}
    norms = {"memory/M_norm/layer_0": 5.0, "memory/z_norm/layer_0": 7.0}
    gained = SimpleNamespace(none={"validation/gained_by_memory": -0.01}, some={"validation/gained_by_memory": 0.01})
    assert not health.hints(50, alike | norms | gained.none)  # too early for any of it
    assert not health.hints(150, {"memory/gate_spread": 0.2, "memory/gates_pinned": 0.25} | norms | gained.some)
    (hint,) = health.hints(200, alike | norms)
    assert "all gates are alike, within 0.0010" in hint
    assert not health.hints(210, alike | {name: 9 * norm for name, norm in norms.items()})
    (hint,) = health.hints(220, alike | {name: 11 * norm for name, norm in norms.items() if "M" in name})
    assert "the norm of M in layer_0 has grown from 5 to 55" in hint
    (hint,) = health.hints(300, gained.none)
    assert "the memory costs 0.0100" in hint
    assert not health.hints(400, gained.none)
