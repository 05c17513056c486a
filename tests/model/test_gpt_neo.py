"""GPT-Neo: one segment computes the same, its weights load, and ours start and are saved as its are."""

import pytest
import torch
import torch.nn.functional as F
from reference import TINY, random_ids, tiny_model
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM, InfiniGPTNeoModel

GPT_NEO = {name: value for name, value in TINY.items() if name != "segment_length"} | {"initializer_range": 0.3}


def gpt_neo() -> GPTNeoForCausalLM:
    torch.manual_seed(0)
    return GPTNeoForCausalLM(GPTNeoConfig(**GPT_NEO)).eval()


@pytest.mark.parametrize("kinds", [["global"], ["local"], ["global", "local"]])
@pytest.mark.parametrize("T", [1, 2, 15, 16])
def test_one_segment_equals_gpt_neo(kinds, T):
    fields = GPT_NEO | {"num_layers": len(kinds), "attention_types": [[kinds, 1]]}
    torch.manual_seed(0)
    theirs = GPTNeoForCausalLM(GPTNeoConfig(**fields)).eval()
    ours = InfiniGPTNeoForCausalLM(InfiniGPTNeoConfig(segment_length=16, gate_init=3.0, **fields)).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert all(name.endswith("beta") for name in missing) and not unexpected
    ids = random_ids(2, T)
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        if T > 1:
            want = theirs(ids, labels=ids).loss
            assert_close(ours(ids, labels=ids).loss, want, rtol=1e-5, atol=1e-5)


def test_from_pretrained_checks_overrides(tmp_path):
    gpt_neo().save_pretrained(tmp_path)
    for load in (InfiniGPTNeoConfig.from_pretrained, InfiniGPTNeoForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="segment_length=0 must be at least 1"):
            load(tmp_path, segment_length=0)
    config, unused = InfiniGPTNeoConfig.from_pretrained(tmp_path, segment_length=8, other=1, return_unused_kwargs=True)
    assert config.segment_length == 8 and unused == {"other": 1}


def test_a_gpt_neo_checkpoint_loads(tmp_path):
    """save_pretrained of GPT-Neo, then from_pretrained of this model; left padding changes nothing."""
    theirs = gpt_neo()
    theirs.save_pretrained(tmp_path)
    ours, info = InfiniGPTNeoForCausalLM.from_pretrained(
        tmp_path, segment_length=16, gate_init=0.25, output_loading_info=True
    )
    assert sorted(info["missing_keys"]) == [f"transformer.h.{i}.attn.attention.beta" for i in range(2)]
    assert not info["unexpected_keys"]
    assert ours.config.segment_length == 16
    for layer in ours.transformer.h:
        assert torch.equal(layer.attention.beta, torch.full((2,), 0.25))
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert not ours.training

    ids, padding = random_ids(2, 12), 4
    with torch.no_grad():
        want = theirs(ids).logits
        assert_close(ours(ids).logits, want, rtol=1e-5, atol=1e-5)
        padded, mask = F.pad(ids, (padding, 0)), F.pad(torch.ones_like(ids), (padding, 0))
        assert_close(ours(padded, mask).logits[:, padding:], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position_embedding", ["segment", "rotary"])
def test_a_saved_model_loads_unchanged(tmp_path, position_embedding):
    model, ids = tiny_model(dtype=torch.float32, position_embedding=position_embedding), random_ids(2, 11)
    model.save_pretrained(tmp_path)
    for cls in (InfiniGPTNeoForCausalLM, AutoModelForCausalLM):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is InfiniGPTNeoForCausalLM
        for name, weight in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], weight), name
        assert torch.equal(again(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is InfiniGPTNeoModel
    assert torch.equal(base(ids).last_hidden_state, model.transformer(ids).last_hidden_state)


def test_weights_are_initialized_like_gpt_neos():
    config = InfiniGPTNeoConfig(**(TINY | {"hidden_size": 64, "vocab_size": 500, "gate_init": -1.5}))
    model = InfiniGPTNeoForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("beta"):
            assert torch.equal(weight, torch.full_like(weight, -1.5))
        elif name.endswith("bias"):
            assert not weight.any(), name
        elif "ln_" in name:
            assert (weight == 1).all(), name
        else:
            assert_close(weight.std(), torch.tensor(config.initializer_range), rtol=0.2, atol=0, msg=name)
