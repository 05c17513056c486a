"""Stages of data: when they change, what each step trains on, and that stops, kills and rollbacks change nothing."""

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import SHAPE, build, run_ranks, start_ranks

from data_prep.prepare import PrepareOptions, prepare
from infini_ds.checkpoint.manifest import complete_checkpoints, read_manifest
from infini_ds.checkpoint.skip_records import Rollback, append_rollback, read_rollbacks
from infini_ds.config.lr_schedule import factor, gate_factor
from infini_ds.config.recipe import load_recipe
from infini_ds.config.resolve import resolve
from infini_ds.data.streams import TrainingStream
from infini_ds.distributed.environment import DistEnv, detect_environment
from infini_ds.evaluation.report import evaluate_run, report_facts
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.planning.doctor import check_node
from infini_ds.planning.plan import make_plan
from infini_ds.training.hooks import Hook
from infini_ds.training.model_builder import build_model
from infini_ds.training.optimizer_groups import parameter_groups

TASK = "pairs,first=value,pairs=2,values=2"
# Rows of 64, 128 and 256 tokens: 8, 4 and 2 of them are a step of 512 tokens.
STAGES = {"near": (64, "distance=0"), "far": (128, "distance=32-64"), "long": (256, "distance=64-160")}
CHOICES = [
    *("batch.tokens=512", "batch.micro_rows=2", "steps=16", "log_every=1", "checkpoint.every=1"),
    *("checkpoint.keep_last=20", "optimizer.learning_rate=0.005", "schedule.kind=cosine", "schedule.warmup_steps=2"),
    *(f"validation.recall={TASK},distance=0", "validation.recall_examples=40", "validation.every=3"),
    "validation.rows=4",
]
RECALL = "validation/recall/pairs_first_value_pairs_2_values_2_distance_0"
FIRST, SECOND = 3, 8  # the steps after which the second and the third stage begin


@pytest.fixture(scope="module")
def curriculum(tmp_path_factory) -> str:
    """The option of a curriculum: a stage that recall ends, one that a number of steps ends, and the last one."""
    folder = tmp_path_factory.mktemp("stages")
    for name, (length, distance) in STAGES.items():
        source = f"recall:{TASK},queries=4,{distance},multiple=32,documents=300"
        options = PrepareOptions(source=source, out=folder / name, sequence_length=length, workers=1)
        prepare(replace(options, validation_fraction=0.1), quiet=True)
    near, far, long = (folder / name for name in STAGES)
    return f"data.curriculum=[{{path: {near}, until: 0.1}}, {{path: {far}, steps: 5}}, {{path: {long}}}]"


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def recorded(run: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in read_metrics(run) if name in line]


@pytest.fixture(scope="module")
def one(curriculum, tmp_path_factory) -> Path:
    """A run of one rank that is never stopped, with the checkpoint of each step."""
    output = tmp_path_factory.mktemp("runs")
    build(curriculum, f"output={output}", "name=one", *SHAPE, *CHOICES).fit()
    return output / "one"


def test_stages_change_at_their_recall_or_after_their_steps(one, curriculum):
    assert recorded(one, "train/stage") == [(step, 1 + (step > FIRST) + (step > SECOND)) for step in range(1, 17)]
    assert [step for step, _ in recorded(one, RECALL)] == [0, 3, 6, 9, 12, 15, 16]
    assert [int(value) for _, value in recorded(one, "train/tokens")] == [512 * step for step in range(1, 17)]
    state = read_manifest(complete_checkpoints(one)[-1]).state
    assert (state.stage, state.stage_start) == (2, SECOND)


def test_each_step_is_what_plain_pytorch_makes_of_its_stage(one, curriculum):
    """No engine, no micro-batches, no curriculum: the batches of each stage's stream, one after the other."""
    recipe = load_recipe(None, [curriculum, *SHAPE, *CHOICES])
    run = resolve(recipe, detect_environment())
    model, choice = build_model(recipe, run.model_config, run.block_schedule), recipe.optimizer
    groups = parameter_groups(model, choice)
    optimizer = torch.optim.AdamW(groups, betas=(choice.beta1, choice.beta2), eps=choice.eps)
    peaks = [choice.learning_rate, choice.learning_rate, choice.gate_learning_rate]
    curve, step = [], 0
    for stage, last in zip(run.stages, (FIRST, SECOND, 16), strict=True):
        batches = iter(TrainingStream(list(stage.sources), stage.batch_shape.rows, recipe.data.seed, 0))
        while step < last:
            of_weights = factor(recipe.schedule, recipe.steps, step)
            factors = [of_weights, of_weights, gate_factor(recipe.schedule, recipe.steps, step)]
            for group, peak, by in zip(optimizer.param_groups, peaks, factors, strict=True):
                group["lr"] = peak * by
            batch = next(batches)
            assert batch.input_ids.shape == (stage.batch_shape.rows, stage.sequence_length)
            (complete,) = batch.micro_batches(len(batch), "cpu")
            loss = model(**complete).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), choice.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
            step += 1
    assert losses(one) == pytest.approx(curve, abs=1e-4)


@pytest.mark.parametrize("own", [["batch.micro_rows=1"], ["parallel.sequence=2"]], ids=["data", "sequence"])
def test_two_ranks_train_as_one(own, one, curriculum, tmp_path):
    output = run_ranks(2, curriculum, f"output={tmp_path}", "name=two", *SHAPE, *CHOICES, *own)
    two = tmp_path / "two"
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert recorded(two, "train/stage") == recorded(one, "train/stage")
    (line,) = (line for line in output.splitlines() if line.startswith(f"step {FIRST}: stage 2 of 3: recall 0."))
    assert " reached 0.1: " in line and line.endswith("/far, 4 rows of 128 tokens a step")
    (line,) = (line for line in output.splitlines() if line.startswith(f"step {SECOND}: stage 3 of 3: "))
    assert ": stage 2 has run its 5 steps: " in line and line.endswith("/long, 2 rows of 256 tokens a step")


def test_data_workers_that_have_read_ahead_change_nothing(one, curriculum, tmp_path):
    build(curriculum, f"output={tmp_path}", "name=workers", *SHAPE, *CHOICES, "data.workers=1").fit()
    for name in ("train/loss", "train/stage"):
        assert recorded(tmp_path / "workers", name) == recorded(one, name)


def copy_until(run: Path, step: int, output: Path) -> Path:
    """Copy a run as a kill after the checkpoint of a step leaves it."""
    copy = output / run.name
    shutil.copytree(run, copy)
    for checkpoint in complete_checkpoints(copy):
        if read_manifest(checkpoint).state.step > step:
            shutil.rmtree(checkpoint)
    return copy


@pytest.mark.parametrize("step", [FIRST - 1, FIRST, FIRST + 1, SECOND, SECOND + 2])
def test_a_run_resumes_exactly_from_any_step(step, one, curriculum, tmp_path):
    """Within a stage, just before a change, and from the checkpoint that is written at a change."""
    run = copy_until(one, step, tmp_path)
    build(curriculum, f"output={tmp_path}", "name=one", *SHAPE, *CHOICES).fit()
    for name in ("train/loss", "train/stage", "train/tokens", "validation/loss"):
        assert recorded(run, name) == recorded(one, name)


def test_a_run_resumes_in_a_stage_on_another_number_of_ranks(one, curriculum, tmp_path):
    run = copy_until(one, FIRST + 2, tmp_path)
    output = run_ranks(2, curriculum, f"output={tmp_path}", "name=one", *SHAPE, *CHOICES, "batch.micro_rows=1")
    assert "stage 2 of 3: " in output
    assert losses(run) == pytest.approx(losses(one), abs=1e-4)
    assert recorded(run, "train/stage") == recorded(one, "train/stage")


class StopsAt(Hook):
    """A signal that arrives during a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_start(self, trainer, step):
        if step.number == self.step:
            trainer.shutdown.received = signal.SIGTERM


@pytest.mark.parametrize("step", [FIRST, FIRST + 2, SECOND, SECOND + 1])
def test_a_run_that_is_asked_to_stop_resumes_exactly(step, one, curriculum, tmp_path):
    """At a change of stage, that change is made when the run resumes, after the validation that decides it."""
    where = [curriculum, f"output={tmp_path}", "name=stopped", *SHAPE, *CHOICES, "checkpoint.every=20"]
    trainer = build(*where)
    trainer.hooks = [StopsAt(step), *trainer.hooks]
    assert not trainer.fit() and trainer.state.step == step
    build(*where).fit()
    for name in ("train/loss", "train/stage", "validation/loss"):
        assert recorded(tmp_path / "stopped", name) == recorded(one, name)


def test_a_stop_while_recall_is_measured_decides_nothing(one, curriculum, tmp_path):
    where = [curriculum, f"output={tmp_path}", "name=stopped", *SHAPE, *CHOICES]
    trainer = build(*where)
    agree, calls = trainer.shutdown.agree, []

    def stop_in_recall(device) -> bool:
        calls.append(trainer.state.step)
        if calls.count(FIRST) == 5:  # two batches of validation rows, with the memory on and off, come first
            trainer.shutdown.agreed = signal.SIGTERM
        return agree(device)

    trainer.shutdown.agree = stop_in_recall
    assert not trainer.fit() and (trainer.state.step, trainer.state.stage) == (FIRST, 0)
    build(*where).fit()
    for name in ("train/loss", "train/stage", "validation/loss"):
        assert recorded(tmp_path / "stopped", name) == recorded(one, name)


def test_two_ranks_that_are_killed_in_a_stage_resume_exactly(curriculum, tmp_path):
    arguments = [curriculum, f"output={tmp_path}", *SHAPE, *CHOICES, "batch.micro_rows=1", "checkpoint.every=2"]
    run_ranks(2, *arguments, "name=undisturbed")
    run, ranks = tmp_path / "killed", start_ranks(2, *arguments, "name=killed")
    try:
        deadline = time.monotonic() + 180
        while len(losses(run)) < FIRST + 2:
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.005)
    finally:
        for rank in ranks:
            os.killpg(rank.pid, signal.SIGKILL)
            rank.communicate()
    assert len(losses(run)) < 16
    run_ranks(2, *arguments, "name=killed")
    for name in ("train/loss", "train/stage", "validation/loss"):
        assert recorded(run, name) == recorded(tmp_path / "undisturbed", name)


def test_a_rollback_may_return_to_an_earlier_stage(one, curriculum, tmp_path):
    """Two steps of the second stage fail, and the newest checkpoint from before is of the first one. What follows is a
    run that skips the rows of these steps from its start on.
    """
    choices = [*SHAPE, *CHOICES, "checkpoint.every=2", "stability.max_consecutive_skips=2"]
    bad = (FIRST + 1, FIRST + 2)
    trainer = build(curriculum, f"output={tmp_path}", "name=failing", *choices)

    class Fails(Hook):
        """Poisons the loss of some steps, once."""

        rows: list[int] = []

        def on_step_start(self, trainer, step):
            if step.number in bad and not read_rollbacks(tmp_path / "failing"):
                self.rows += step.batch.row_numbers
                hook = trainer.model.register_forward_hook(poison, with_kwargs=True)
                self.remove = hook.remove

        def before_step(self, trainer, step):
            if step.number in bad and hasattr(self, "remove"):
                self.remove()

    def poison(_, arguments, keywords, output):
        output.loss = output.loss + torch.nan
        return output

    fails = Fails()
    trainer.hooks = [fails, *trainer.hooks]
    assert trainer.fit()
    (rollback,) = read_rollbacks(tmp_path / "failing")
    first_row = trainer.run.stages[1].first_row
    assert (rollback.from_step, rollback.to_step) == (FIRST + 2, FIRST - 1)
    assert rollback.rows == sorted(fails.rows) and min(rollback.rows) >= first_row > 0

    expected = tmp_path / "expected"
    expected.mkdir()
    append_rollback(expected, Rollback(1, 0, "as in the other run", rollback.rows))
    build(curriculum, f"output={tmp_path}", "name=expected", *choices).fit()
    shown = [line for line in recorded(tmp_path / "failing", "train/loss") if line[0] not in bad]
    assert shown == [line for line in recorded(expected, "train/loss") if line[0] not in bad]
    assert shown[:FIRST] == recorded(one, "train/loss")[:FIRST]


def test_plan_doctor_and_report_know_the_stages(one, curriculum, tmp_path):
    recipe = load_recipe(None, [curriculum, f"output={tmp_path}", *SHAPE, *CHOICES])
    work = make_plan(recipe).work
    assert (work.rows, work.tokens, work.accumulation) == (2, 256, 1), "the stage that takes most memory"
    found = list(check_node(recipe, DistEnv(0, 0, 1, 1), fix=False))
    assert [finding.state for finding in found if finding.check == "shards"] == ["ok"] * 3
    assert not [finding.sentence for finding in found if finding.state == "problem"]

    facts = dict(report_facts(evaluate_run(one, one, 2)))
    assert facts["trained"] == "16 steps, 8,192 tokens, in stage 3 of 3"
    assert facts["data"].endswith("; in rows of 64, 128, 256")
    off = recorded(one, RECALL.replace("recall/", "recall_memory_off/"))[-1][1]
    accuracy = recorded(one, RECALL)[-1][1]
    assert facts["recall"] == f"{accuracy:.3f}, with the memory off {off:.3f} ({RECALL.rpartition('/')[2]})"


def test_a_run_that_ends_before_its_last_stage_says_so(curriculum, tmp_path, capsys):
    build(curriculum, f"output={tmp_path}", "name=short", *SHAPE, *CHOICES, "steps=2").fit()
    assert "step 2: the run is complete in stage 1 of 3: later stages need more steps=" in capsys.readouterr().out
