"""Named sizes of the model."""

import pytest
import torch

from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.model.presets import PRESETS, preset_config
from infini_ds.planning.flops import training_flops_per_token


@pytest.mark.parametrize(
    ("name", "millions"),
    # Published sizes; GPT-Neo's with its own vocabulary. The study counts 9.4 with its own shapes.
    [("study-9m", 9.4), ("125m", 125), ("350m", 355), ("1.3b", 1316), ("2.7b", 2651)],
)
def test_presets_have_their_published_size(name, millions):
    with torch.device("meta"):
        model = InfiniGPTNeoForCausalLM(preset_config(name))
    model.tie_weights()  # transformers 5.0 ties nothing on the meta device
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.03)


def test_every_preset_can_be_built():
    for name in PRESETS:
        preset_config(name, vocab_size=500)


def test_flops_follow_the_usual_rule():
    """About 6 operations for each parameter of a matrix, the embedding counted once, as output layer."""
    assert training_flops_per_token(preset_config("1.3b")) == pytest.approx(6 * 1316e6, rel=0.03)
