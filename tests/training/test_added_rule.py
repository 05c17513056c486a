"""A memory rule that the project does not have is added from outside, and takes the complete way of a built-in one."""

import json

import gated_decay  # noqa: F401, registers the rule
import pytest
import torch
from harness import ROOT, SHAPE, STEPS, call_script, finish_ranks, start_ranks

from infini_ds.checkpoint.manifest import complete_checkpoints
from infini_ds.conversion.locate import load_model, locate
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.model import InfiniGPTNeoForCausalLM

RULE = ["model.memory_rule=gated_decay", "model.segments_per_block=3", "model.gradient_checkpointing=true"]
SCRIPT = str(ROOT / "tests" / "support" / "with_gated_decay.py")


def train_on_two_ranks(shards, output, name: str, *overrides: str) -> None:
    recipe = [f"data.path={shards}", f"output={output}", f"name={name}", *SHAPE, *STEPS, "batch.micro_rows=1"]
    path = f"{ROOT}:{ROOT / 'tests' / 'support'}"
    arguments = ["launch/pretrain.py", *recipe, *RULE, *overrides]
    finish_ranks(start_ranks(2, *arguments, script=SCRIPT, PYTHONPATH=path))


@pytest.fixture(scope="module")
def output(shards, tmp_path_factory):
    """Two runs of the rule on two ranks of ZeRO-2: `through`, and `resumed`, which is interrupted after 8 steps."""
    output = tmp_path_factory.mktemp("added-rule")
    train_on_two_ranks(shards, output, "through", "validation.every=10")
    train_on_two_ranks(shards, output, "resumed", "steps=8", "schedule.kind=constant")
    train_on_two_ranks(shards, output, "resumed", "validation.every=10", "schedule.kind=constant")
    return output


def test_it_trains_and_its_parameters_learn(output):
    losses = [line["train/loss"] for line in read_metrics(output / "through") if "train/loss" in line]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
    model = load_model(locate(output / "through"))
    for layer in model.transformer.h:
        decay = layer.attention.memory_parameters["a"]
        assert decay.shape == (2,) and not torch.equal(decay, torch.full((2,), 2.0))


def test_it_resumes_from_its_checkpoints(output):
    assert [folder.name for folder in complete_checkpoints(output / "resumed")][-1] == "step-000020"
    steps = [line["step"] for line in read_metrics(output / "resumed") if "train/loss" in line]
    assert steps == list(range(1, 21))


def test_it_is_planned(output, capsys):
    options = ["--sequence-length", "4096", *SHAPE, *RULE, "batch.rows=2", "data.path=/nowhere", "--memory", "16"]
    done = call_script("launch/plan.py", *options)
    assert "it fits" in done.stdout


def test_it_is_exported_and_evaluated(output, shards):
    export = output / "through" / "export"
    call_script("launch/convert.py", output / "through", "--out", export)
    assert json.loads((export / "config.json").read_text())["memory_rule"] == "gated_decay"
    exported = InfiniGPTNeoForCausalLM.from_pretrained(export).eval()
    ids = torch.arange(1, 201).view(2, 100)
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, load_model(locate(output / "through"))(ids).logits)
    call_script("launch/evaluate.py", export, "--data", shards, "--tasks", "position", "--rows", "4")
    result = json.loads((export / "evaluation" / "evaluation.json").read_text())["tasks"]["position"]
    assert result["memory"]["on"]["loss"] != result["memory"]["off"]["loss"]


def test_an_unknown_rule_lists_the_known_ones(shards, tmp_path):
    options = [f"data.path={shards}", f"output={tmp_path}", *SHAPE, "batch.rows=4", "model.memory_rule=gated"]
    done = call_script("launch/pretrain.py", *options, code=2)
    assert "memory_rule='gated' is not one of" in done.stderr and "linear" in done.stderr
