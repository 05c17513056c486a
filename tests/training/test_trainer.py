"""Training: ranks, micro-batches, blocks and stops change no loss; the engine equals an unsharded reference."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import ROOT, SHAPE, TINY, build, environment, launch_pretrain, pretrain, run_script, start_ranks
from transformers import AutoTokenizer

from data_prep.manifest import load_manifest
from infini_ds.checkpoint.manifest import complete_checkpoints
from infini_ds.config.lr_schedule import factor, gate_factor
from infini_ds.config.recipe import load_recipe
from infini_ds.config.resolve import resolve
from infini_ds.config.training_data import find_sources
from infini_ds.conversion.locate import load_model, locate
from infini_ds.data.streams import TrainingStream
from infini_ds.distributed.environment import detect_environment
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.training.hooks import Hook
from infini_ds.training.model_builder import build_model
from infini_ds.training.optimizer_groups import parameter_groups


def losses(run) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def wait_for_steps(process: subprocess.Popen, run, steps: int) -> None:
    deadline = time.monotonic() + 120
    while len(losses(run)) < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def largest_difference(a, b) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def reference(shards) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training written out in plain PyTorch: no engine, no ranks, no micro-batches, no checkpointing."""
    recipe = load_recipe(None, [f"data.path={shards}", *TINY])
    run = resolve(recipe, detect_environment())
    model = build_model(recipe, run.model_config, run.block_schedule)
    choice = recipe.optimizer
    groups = parameter_groups(model, choice)
    optimizer = torch.optim.AdamW(groups, betas=(choice.beta1, choice.beta2), eps=choice.eps)
    peaks = [choice.learning_rate, choice.learning_rate, choice.gate_learning_rate]
    sources = find_sources(str(shards), [], "")
    batches, curve = iter(TrainingStream(sources, recipe.batch.rows, recipe.data.seed, 0)), []
    for step in range(recipe.steps):
        of_weights = factor(recipe.schedule, recipe.steps, step)
        factors = [of_weights, of_weights, gate_factor(recipe.schedule, recipe.steps, step)]
        for group, peak, by in zip(optimizer.param_groups, peaks, factors, strict=True):
            group["lr"] = peak * by
        batch = next(batches)
        (complete,) = batch.micro_batches(recipe.batch.rows, "cpu")
        loss = model(**complete).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), choice.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
        assert batch.predicted_tokens == recipe.batch.rows * 255
    return curve, model.state_dict()


def test_engine_equals_plain_pytorch(runs, reference):
    curve, weights = reference
    assert curve[-1] < curve[0] - 0.5  # it learns something
    assert largest_difference(losses(runs / "one"), curve) < 1e-4
    trained = load_model(locate(runs / "one")).state_dict()
    assert all(torch.allclose(trained[name], weights[name], atol=1e-3) for name in weights)


def test_two_ranks_of_zero2_give_the_losses_of_one(runs):
    assert largest_difference(losses(runs / "two"), losses(runs / "one")) < 1e-4
    validated = [[line["validation/loss"] for line in read_metrics(run) if "validation/loss" in line]
                 for run in (runs / "one", runs / "two")]  # fmt: skip
    assert largest_difference(*validated) < 1e-4


@pytest.fixture(scope="module")
def uneven(shards, corpus, tmp_path_factory):
    """Four rows, the last of which is mostly padding: rows and micro-batches with unequal numbers of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(shards / "tokenizer")
    text = (corpus / "argparse.txt").read_text()
    ids = tokenizer(text)["input_ids"][: 3 * 256 + 40]
    folder = tmp_path_factory.mktemp("uneven")
    for split, content in (("train", tokenizer.decode(ids)), ("valid", text[-2000:])):
        (folder / split).mkdir()
        (folder / split / "text.txt").write_text(content)
    sources = ["--source", f"text:{folder / 'train'}", "--validation-source", f"text:{folder / 'valid'}"]
    options = ["--tokenizer", shards / "tokenizer", "--sequence-length", "256", "--workers", "1"]
    run_script("-m", "data_prep", *sources, "--out", folder / "shards", *options)
    assert load_manifest(folder / "shards").train.rows == 4
    return folder / "shards"


def test_no_division_of_the_work_changes_the_losses(uneven, tmp_path):
    """One rank and all at once; micro-batches; and two ranks of ZeRO-2 with a segment at a time, recomputed: submodules
    that are used many times a step and unequal numbers of tokens, where sharded gradients and means went wrong.
    """
    pretrain(uneven, tmp_path, "whole", "batch.micro_rows=4")
    pretrain(uneven, tmp_path, "parts", "batch.micro_rows=1")
    blocks = ["batch.micro_rows=1", "model.segments_per_block=1", "model.gradient_checkpointing=true"]
    blocks += ["model.checkpoint_layers=true", "model.offload_states=true"]
    launch_pretrain(uneven, tmp_path, "blocks", *blocks, ranks=2)
    assert largest_difference(losses(tmp_path / "parts"), losses(tmp_path / "whole")) < 1e-5
    assert largest_difference(losses(tmp_path / "blocks"), losses(tmp_path / "whole")) < 1e-5


def test_killed_and_resumed_equals_never_stopped(runs, shards, tmp_path, capsys):
    """SIGKILL some steps after the checkpoint of step 8; resumed from there, to the same bits."""
    command = [sys.executable, "launch/pretrain.py", f"data.path={shards}", f"output={tmp_path}", "name=killed", *TINY]
    one_core = partial(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))})  # one thread, as in this process
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, preexec_fn=one_core)
    run = tmp_path / "killed"
    try:
        wait_for_steps(process, run, 10)
    finally:
        process.kill()
        process.wait()
    assert [folder.name for folder in complete_checkpoints(run)] == ["step-000008"]
    assert len(losses(run)) < 20
    log = (run / "train.log").read_text()
    assert "rank 0 INFO infini_ds.training.trainer: step 8: checkpoint in " in log

    pretrain(shards, tmp_path, "killed")
    output = capsys.readouterr().out
    assert "resumed from" in output and "step-000008" in output
    assert losses(run) == losses(runs / "one")
    a, b = (load_model(locate(folder)).state_dict() for folder in (run, runs / "one"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    # Two checkpoints are kept, the last of them of the last step.
    assert [folder.name for folder in complete_checkpoints(run)] == ["step-000016", "step-000020"]


def test_a_checkpoint_without_its_manifest_is_skipped(shards, tmp_path, capsys):
    """This is what a crash while saving leaves."""
    pretrain(shards, tmp_path, "half", "steps=8", "schedule.kind=constant")
    half = tmp_path / "half" / "checkpoints" / "step-000012"
    half.mkdir()
    (half / "mp_rank_00_model_states.pt").write_bytes(b"PK broken")
    pretrain(shards, tmp_path, "half", "steps=12", "schedule.kind=constant")
    assert "step-000008: " in capsys.readouterr().out
    assert complete_checkpoints(tmp_path / "half")[-1].name == "step-000012"


def test_bf16_with_the_json_of_gpus_follows_fp32(runs, shards, tmp_path):
    """bf16 with fp32 gradients, blocks and recomputing, on ds_configs/zero2.json, as far as a CPU can show it."""
    choices = ["precision=bf16", f"deepspeed={ROOT / 'ds_configs' / 'zero2.json'}"]
    blocks = ["model.segments_per_block=2", "model.gradient_checkpointing=true"]
    pretrain(shards, tmp_path, "bf16", *choices, *blocks)
    assert largest_difference(losses(tmp_path / "bf16"), losses(runs / "one")) < 0.02
    model = load_model(locate(tmp_path / "bf16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # the master copies


def test_one_exchange_a_step(uneven, tmp_path):
    """The collectives that the project calls in each step of two ranks, logged steps included; DeepSpeed's apart."""
    choices = [*SHAPE, "batch.rows=4", "steps=5", "log_every=2", "validation.every=0", "schedule.warmup_steps=0"]
    arguments = [f"data.path={uneven}", f"output={tmp_path}", "name=counted", *choices]
    ranks = start_ranks(2, str(tmp_path), *arguments, script="tests/support/count_collectives.py")
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    for rank in range(2):
        counted = json.loads((tmp_path / f"collectives-{rank}.json").read_text())
        assert counted["ours"] == [["all_gather_into_tensor"]] * 5
        assert all("all_reduce" in calls for calls in counted["deepspeed"])  # the counting reaches what is called


class Reads:
    """A Tensor subclass that records when a value computed from it is read on the host."""

    def __init__(self):
        self.events: list[str] = []
        record = self.events.append
        reading = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
        reading |= {torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__}

        class Watched(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                if function in reading:
                    record("read")
                return super().__torch_function__(function, types, args, kwargs or {})

        self.watched = Watched


@pytest.mark.parametrize("on_spike", ["flag", "roll_back"])
def test_the_loss_is_read_after_the_optimizer_step(on_spike, shards, tmp_path):
    """The host waits for the loss before it only if a spike would roll the run back, once spikes are looked for."""
    spikes = [f"stability.on_spike={on_spike}", "stability.spike_window=2", "stability.check_gradients=false"]
    where = [f"data.path={shards}", f"output={tmp_path}", f"name={on_spike}"]
    trainer = build(*where, *TINY, "steps=4", "schedule.warmup_steps=1", "batch.micro_rows=4", *spikes)
    reads = Reads()

    def watch(_, __, output):
        output.loss = output.loss.as_subclass(reads.watched)
        return output

    class Events(Hook):
        def before_step(self, trainer, step):
            reads.events.append("optimizer")

        def on_step_end(self, trainer, step):
            reads.events.append("end")

    trainer.model.register_forward_hook(watch)
    trainer.hooks = [*trainer.hooks, Events()]
    trainer.fit()
    after, before = ["optimizer", "read", "end"], ["read", "optimizer", "end"]
    assert reads.events == after * 4 if on_spike == "flag" else after * 2 + before * 2


class Recorder(Hook):
    """Records the events of a run."""

    def __init__(self, events: list[str]):
        for name in [name for name in vars(Hook) if not name.startswith("_")]:
            setattr(self, name, lambda *_, name=name: events.append(name))


def test_hooks_are_called_in_order(shards, tmp_path):
    events: list[str] = []
    where = [f"data.path={shards}", f"output={tmp_path}", "name=hooks"]
    trainer = build(*where, *TINY, "steps=2", "schedule.warmup_steps=1", "validation.every=2", "validation.rows=2")
    trainer.hooks = [*trainer.hooks, Recorder(events)]
    assert trainer.fit()
    first = ["on_start", "after_validation"]
    step = ["on_step_start", "before_step", "after_step"]
    assert events == [*first, *step, "on_step_end", *step, "after_validation", "on_step_end", "on_end"]


def test_hooks_end_after_an_error(shards, tmp_path):
    class Fails(Hook):
        def after_step(self, trainer, step):
            raise RuntimeError("step failed")

    events: list[str] = []
    trainer = build(f"data.path={shards}", f"output={tmp_path}", "name=error", *TINY)
    trainer.hooks = [*trainer.hooks, Fails(), Recorder(events)]
    with pytest.raises(RuntimeError, match="step failed"):
        trainer.fit()
    assert events == ["on_start", "on_step_start", "before_step", "on_end"]


def test_the_log_file_is_appended_on_resume(runs, shards, tmp_path):
    """Messages of all runs in one folder, with time, level and rank; the terminal shows them plain."""
    where = [f"data.path={shards}", f"output={tmp_path}", "name=log", *TINY]
    for steps in (2, 4):
        choices = [f"steps={steps}", "schedule.kind=constant", "schedule.warmup_steps=0"]
        done = run_script("launch/pretrain.py", *where, *choices)
        assert f"step {steps}: checkpoint in" in done.stdout and "INFO" not in done.stdout
    lines = Path(tmp_path, "log", "train.log").read_text().splitlines()
    assert (
        sum(" rank 0 INFO infini_ds.training.setup: log: " in line and " parameters, " in line for line in lines) == 2
    )
    assert sum("resumed from" in line for line in lines) == 1
    assert all(line[:4].isdigit() for line in lines)
