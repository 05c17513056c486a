"""A model with a short convolution is trained, resumed, exported and used alone; fine-tuning adds one to a model."""

import json

import pytest
import torch
from alone import run_alone
from harness import call_script, pretrain
from torch.testing import assert_close

from infini_ds.conversion.locate import load_model, locate
from infini_ds.metrics.metric_writers import read_metrics

CONVOLVED = ["model.short_conv=2", "model.segments_per_block=3", "model.gradient_checkpointing=true"]

USE = """
import sys
import torch
from transformers import AutoModelForCausalLM

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(1, 101)[None]
with torch.no_grad():
    logits = model(ids).logits
text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=None)
torch.save({"logits": logits, "text": text}, out)
"""


@pytest.fixture(scope="module")
def output(shards, tmp_path_factory):
    """Two runs: `through`, and `resumed`, which is interrupted after 8 steps."""
    output = tmp_path_factory.mktemp("short-conv")
    pretrain(shards, output, "through", *CONVOLVED, "schedule.kind=constant")
    pretrain(shards, output, "resumed", *CONVOLVED, "schedule.kind=constant", "steps=8")
    pretrain(shards, output, "resumed", *CONVOLVED, "schedule.kind=constant")
    return output


def train_losses(run) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def test_it_trains_and_resumes_with_the_same_losses(output):
    losses = train_losses(output / "through")
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
    assert train_losses(output / "resumed") == losses
    for layer in load_model(locate(output / "through")).transformer.h:
        for weight in (layer.attention.short_conv.k, layer.attention.short_conv.v):
            assert weight.shape == (2, 32) and (weight != 0.5).all()


def test_an_export_gives_the_same_alone_in_one_pass_and_token_by_token(output, tmp_path):
    export = output / "through" / "export"
    call_script("launch/convert.py", output / "through", "--out", export)
    assert json.loads((export / "config.json").read_text())["short_conv"] == 2
    run_alone(USE, export, tmp_path / "out.pt", cwd=output, cache=tmp_path / "cache")
    alone, model = torch.load(tmp_path / "out.pt"), load_model(locate(output / "through"))
    text = torch.arange(1, 101)[None]
    with torch.no_grad():
        assert torch.equal(alone["logits"], model(text).logits)
        for _ in range(40):  # across the end of a segment
            text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(alone["text"], text)


def test_fine_tuning_adds_one_that_changes_nothing_at_first(runs, shards, tmp_path):
    call_script("launch/convert.py", runs / "one", "--out", tmp_path / "plain")
    start = [f"model.start_from={tmp_path / 'plain'}"]
    for name, more in (("with", ["model.short_conv=2"]), ("without", [])):
        pretrain(shards, tmp_path, name, *more, "steps=4", shape=start)
    convolved, plain = (train_losses(tmp_path / name) for name in ("with", "without"))
    assert_close(convolved[0], plain[0], rtol=1e-6, atol=0)
    assert convolved[-1] != plain[-1]
    model = load_model(locate(tmp_path / "with"))
    assert all((layer.attention.short_conv.k[1] != 0).any() for layer in model.transformer.h)
    plan = call_script("launch/plan.py", *start, "model.short_conv=2", "batch.rows=2", f"data.path={shards}").stdout
    assert "it fits" in plan
