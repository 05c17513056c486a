"""Training: ranks, micro-batches, blocks and stops change no number; the engine equals an unsharded reference."""

import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from harness import ROOT, TINY, environment, launch_pretrain, pretrain, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from data_prep.manifest import load_manifest
from infini_ds.checkpoint.manifest import complete_checkpoints
from infini_ds.config.lr_schedule import factor, gate_factor
from infini_ds.config.model_config import block_schedule, model_config
from infini_ds.config.recipe import load_recipe
from infini_ds.config.training_data import find_sources
from infini_ds.conversion.locate import load_model, locate
from infini_ds.data.streams import TrainingStream, ValidationRows
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.training.engine import parameter_groups
from infini_ds.training.model_builder import build_model
from infini_ds.training.validation import position_losses
from infini_ds.utils.errors import UserError


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
    model = build_model(recipe, model_config(recipe, load_manifest(shards)), block_schedule(recipe))
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
        (whole,) = batch.micro_batches(recipe.batch.rows, "cpu")
        loss = model(**whole).loss
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
    """SIGKILL some steps after the checkpoint of step 8; then it goes on from there, to the same bits."""
    command = [sys.executable, "launch/pretrain.py", f"data.path={shards}", f"output={tmp_path}", "name=killed", *TINY]
    one_core = partial(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))})  # one thread, as in this process
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, preexec_fn=one_core)
    try:
        wait_for_steps(process, tmp_path / "killed", 10)
    finally:
        process.kill()
        process.wait()
    assert [folder.name for folder in complete_checkpoints(tmp_path / "killed")] == ["step-000008"]
    assert len(losses(tmp_path / "killed")) < 20

    pretrain(shards, tmp_path, "killed")
    output = capsys.readouterr().out
    assert "going on from" in output and "step-000008" in output
    assert losses(tmp_path / "killed") == losses(runs / "one")
    a, b = (load_model(locate(folder)).state_dict() for folder in (tmp_path / "killed", runs / "one"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    # Two checkpoints are kept, the last of them of the last step.
    assert [folder.name for folder in complete_checkpoints(tmp_path / "killed")] == ["step-000016", "step-000020"]


def test_half_written_checkpoint_is_passed_over(shards, tmp_path, capsys):
    """A checkpoint without its mark is what a crash while saving leaves."""
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


def test_full_disk_gets_a_sentence(shards, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", full], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(UserError, match=r"checkpoint of step 8 could not be written .* MiB are free: make room"):
            pretrain(shards, full, "run")
        assert not complete_checkpoints(full / "run")
    finally:
        subprocess.run(["umount", "--lazy", full], check=True)


def test_finished_run_says_so(runs, shards):
    arguments = [f"data.path={shards}", f"output={runs}", "name=one", *TINY, "validation.every=10"]
    assert "nothing to do" in run_script("launch/pretrain.py", *arguments).stdout


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("one", ["batch.rows=8"], ["batch.rows=8", "batch.rows=4", "name="]),
        ("one", ["resume=false"], ["resume=false", "name="]),
        ("one", ["model.config.resid_dropout=0.1"], ["resid_dropout=0.1", "the default"]),
        ("one", ["optimizer.beta2=1.5"], ["optimizer.beta2=1.5"]),
        ("one", ["optimizer.learning_rate=nan"], ["learning_rate=nan"]),
        ("new", ["batch.rows=4000"], ["fewer than one global batch of 4000"]),
        ("new", ["model.preset=tinny"], ["model.preset='tinny'", "study-9m"]),
        ("new", ["model.config.hiden_size=4"], ["model.config.hiden_size", "model.config.hidden_size"]),
        ("new", ["model.config.window_size=null"], ["model.config.window_size=None must be a whole number"]),
        ("new", ["model.config.num_heads=two"], ["model.config.num_heads='two' must be a whole number, such as"]),
        ("new", ["model.config.num_heads=5"], ["hidden_size=32", "num_heads=5"]),
        ("new", ["model.config.vocab_size=100"], ["100 embeddings", "512", "--tokenizer"]),
        ("new", ["model.start_from=/nowhere"], ["model.start_from=/nowhere"]),
        ("new", ["model.segment_length=0"], ["segment_length=0"]),
        ("new", ["model.truncate_blocks=0"], ["truncate_blocks=0", "None for exact gradients"]),
        ("new", ["model.attention=flash"], ["model.attention='flash'", "sdpa"]),
        ("new", ["model.attention=flex_attention"], ["model.attention=flex_attention", "model.attention=sdpa"]),
        ("new", ["data.path=/nowhere"], ["/nowhere", "python -m data_prep"]),
    ],
)
def test_mistakes_get_a_sentence(name, overrides, words, runs, shards):
    with pytest.raises(UserError) as error:
        pretrain(shards, runs, name, *overrides)
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_mistake_under_the_launcher_is_one_sentence(shards, tmp_path):
    done = launch_pretrain(shards, tmp_path, "wrong", "batch.rows=3", ranks=2, code=2)
    text = done.stdout + done.stderr
    assert text.count("batch.rows=3 cannot be divided over 2 ranks") == 1
    assert "Traceback" not in text


def test_output_in_a_log_file_is_plain_and_short(runs):
    lines = (runs / "two" / "output.txt").read_text().splitlines()
    assert sum("training" in line for line in lines) < 20, lines  # one in ten seconds, not one a step
    assert not any("\x1b[" in line or "Warning" in line or "[INFO]" in line for line in lines), lines


def test_validation_does_not_depend_on_micro_rows(runs, shards):
    model, rows = load_model(locate(runs / "one")), ValidationRows(find_sources(str(shards), [], ""))
    one_by_one = position_losses(model, rows, None, 1)
    all_at_once = position_losses(model, rows, None, 64)
    assert torch.allclose(one_by_one.loss, all_at_once.loss, atol=1e-4)
    assert torch.equal(one_by_one.count, all_at_once.count)
    off = position_losses(model, rows, None, 64, use_memory=False)
    assert torch.allclose(off.loss[:30], all_at_once.loss[:30], atol=1e-4)  # the first segment has no memory to read
    assert not torch.allclose(off.loss[40:], all_at_once.loss[40:], atol=1e-3)


def test_metrics_hold_what_is_promised(runs):
    lines = read_metrics(runs / "one")
    last = [line for line in lines if "train/loss" in line][-1]
    for name in ("train/gradient_norm", "train/learning_rate", "speed/tokens_per_s", "speed/mfu", "speed/memory_gib"):
        assert last[name] > 0, name
    assert last["train/tokens"] == 20 * 4 * 256
    for layer in range(2):
        assert last[f"memory/M_norm/layer_{layer}"] > 0 and last[f"memory/z_norm/layer_{layer}"] > 0
        for head in range(2):
            assert abs(last[f"gate/layer_{layer}/head_{head}"] - 0.5) > 1e-3  # gates move from the start
    assert [line["step"] for line in lines if "validation/loss" in line] == [0, 10, 20]
    events = EventAccumulator(str(runs / "one"))
    events.Reload()
    tags = events.Tags()
    assert {"validation/loss", "validation/loss_memory_off", "speed/mfu", "gate/layer_0/head_0"} <= set(tags["scalars"])
    assert "gate" in tags["histograms"]


def test_help_names_the_command():
    assert "deepspeed launch/pretrain.py" in run_script("launch/pretrain.py", "--help").stdout
