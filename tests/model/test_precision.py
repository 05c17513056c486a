"""Low precision, long texts and extreme activations: finite, and the memory in fp32."""

import pytest
import torch
from reference import TINY, gradients, random_ids, tiny_model
from torch.testing import assert_close

from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
@pytest.mark.parametrize("position_embedding", ["segment", "rotary"])
def test_memory_stays_fp32_in_bf16(mode, position_embedding):
    fields = {"segments_per_block": 2, "position_embedding": position_embedding}
    model = tiny_model(dtype=torch.bfloat16 if mode == "bf16" else torch.float32, **fields).train()
    exact_model = tiny_model(**fields)
    exact_model.load_state_dict(model.state_dict())
    ids = random_ids(2, 23)
    mask = torch.ones_like(ids)
    mask[0, 3:9] = 0
    mask[1] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        for inputs in ({}, {"attention_mask": mask}):
            out = model(ids, labels=ids, return_logits=True, **inputs)
            assert out.logits.dtype == torch.bfloat16
            assert {x.dtype for state in out.memory for x in state} == {torch.float32}
            want = exact_model(ids, labels=ids, **inputs)
            assert_close(out.loss.double(), want.loss, rtol=0.05, atol=0)
            for name, gradient in gradients(out.loss, model).items():
                assert gradient.isfinite().all(), name


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_no_nan_where_attention_is_empty(mode):
    """Empty memories, rows and segments of padding only, one token."""
    model = tiny_model(dtype=torch.bfloat16 if mode == "bf16" else torch.float32, segments_per_block=1).train()
    ids = random_ids(3, 14)
    mask = torch.ones_like(ids)
    mask[0], mask[1, :9], mask[2, 5:] = 0, 0, 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        for inputs in (
            {"attention_mask": mask},
            {"attention_mask": mask, "document_ids": torch.arange(14).expand(3, -1)},
        ):
            out = model(ids, labels=ids, loss_reduction="sum", return_logits=True, **inputs)
            assert out.logits.isfinite().all() and out.loss.isfinite()
            assert all(g.isfinite().all() for g in gradients(out.loss, model).values())
        assert model(ids[:, :1]).logits.isfinite().all()


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_long_text_stays_finite_and_z_exact(mode):
    model = tiny_model(dtype=torch.bfloat16 if mode == "bf16" else torch.float32, segments_per_block=128).train()
    ids = random_ids(1, 640 * TINY["segment_length"])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        out = model(ids, labels=ids)
    assert out.loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(out.loss, model).values())
    if mode == "fp32":
        exact_model = tiny_model()
        exact_model.load_state_dict(model.state_dict())
        with torch.no_grad():
            want = exact_model(ids).memory
        for got_state, want_state in zip(out.memory, want, strict=True):
            assert_close(got_state.z.double(), want_state.z, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [10, 30, 100, 1000])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_large_activations_keep_finite_gradients(mode, scale):
    """phi underflows in all channels of a head; a plain ELU(x) + 1 gave gradients of 1e30 at 30 and NaN at 100."""
    torch.manual_seed(0)
    config = InfiniGPTNeoConfig(**(TINY | {"initializer_range": 0.3}))
    model = InfiniGPTNeoForCausalLM(config).train()
    with torch.no_grad():
        for layer in model.transformer.h:
            for projection in (layer.attention.q_proj, layer.attention.k_proj):
                projection.weight *= scale
    model = model.to(torch.bfloat16 if mode == "bf16" else torch.float32)
    ids = random_ids(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        loss = model(ids, labels=ids).loss
    largest = max(g.abs().max() for g in gradients(loss, model).values())
    assert largest < 10  # a few hundredths to a few units in fp64
