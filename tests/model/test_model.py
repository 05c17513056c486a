"""The model against the token-by-token reference, and itself compiled or with flex attention."""

import pytest
import torch
from hypothesis import given, settings
from reference import gradients, random_ids, reference_forward, tiny_model
from strategies import batches
from torch.testing import assert_close

from infini_ds.utils.paths import can_compile_cpp

many = settings(deadline=None, max_examples=60, derandomize=True)
few = settings(deadline=None, max_examples=25, derandomize=True)
exact = {"rtol": 1e-9, "atol": 1e-11}


@given(batches())
@many
def test_model_equals_the_reference(batch):
    model, ids, mask, documents = batch
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    with torch.no_grad():
        out = model(ids, mask, documents)
        logits, M, z = reference_forward(model, ids, mask, documents)
    assert_close(out.logits[valid], logits[valid], **exact)
    assert_close(torch.stack([state.M for state in out.memory]), M, **exact)
    if "z" in out.memory[0]._fields:
        assert_close(torch.stack([state.z for state in out.memory]), z, **exact)


@given(batches(max_segments=3))
@few
def test_every_gradient_equals_the_references(batch):
    """Of the logits, and of the last memory, through which later text would send gradients."""
    model, ids, mask, documents = batch
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    out = model(ids, mask, documents)
    logits, M, z = reference_forward(model, ids, mask, documents)
    weight = torch.randn_like(logits[valid])
    M_weight, z_weight = torch.randn_like(M), torch.randn_like(z)
    got_M, got_z = (torch.stack(states) for states in zip(*out.memory, strict=True))
    got = (weight * out.logits[valid]).sum() + (M_weight * got_M).sum() + (z_weight * got_z).sum()
    want = (weight * logits[valid]).sum() + (M_weight * M).sum() + (z_weight * z).sum()
    want = want + 0 * model.lm_head.weight.sum()  # a graph, also where no token is valid
    assert_close(gradients(got, model), gradients(want, model), rtol=1e-7, atol=1e-8)


def test_the_memory_off_equals_the_reference_without_memory():
    model, ids = tiny_model(segments_per_block=2), random_ids(2, 11)
    with torch.no_grad():
        want, _, _ = reference_forward(model, ids, use_memory=False)
        assert_close(model(ids, use_memory=False).logits, want, **exact)
        assert (model(ids).logits - want)[:, 4:].abs().max() > 1e-2


def test_the_base_model_returns_the_hidden_states_of_the_logits():
    model, ids = tiny_model(), random_ids(2, 11)
    with torch.no_grad():
        hidden = model.transformer(ids).last_hidden_state
        assert_close(model.lm_head(hidden), model(ids).logits, **exact)


@pytest.mark.timeout(600)
@pytest.mark.skipif(not can_compile_cpp(), reason="PyTorch's path has a space, at which its compiler's command breaks")
def test_compiled_layers_give_the_same():
    """Real compilation: with blocks, recomputation, packed documents and a short convolution."""
    fields = {"segment_length": 4, "segments_per_block": 2, "attention_types": [[["global"], 2]], "short_conv": 2}
    model, compiled = tiny_model(**fields).train(), tiny_model(**fields).train()
    compiled.compile_layers()
    ids = random_ids(2, 16)
    documents = torch.tensor([[0] * 6 + [1] * 10, [0] * 16])
    results = []
    for each in (model, compiled):
        each.gradient_checkpointing_enable()
        loss = each(ids, document_ids=documents, labels=ids).loss
        results.append((loss, gradients(loss, each)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] and not torch._dynamo.utils.counters["graph_break"]
    assert_close(results[1], results[0], **exact)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_flex_attention_gives_what_a_mask_gives(device):
    """Packed documents with a mask function, tile by tile. PyTorch has its gradients on GPUs only."""
    S, results = 136, []
    fields = {"segment_length": S, "window_size": 40, "hidden_size": 32, "max_position_embeddings": S}
    documents = torch.rand(2, 3 * S - 5, generator=torch.Generator().manual_seed(0)).lt(0.02).long().cumsum(1)
    ids = random_ids(*documents.shape)
    for kind in ("sdpa", "flex_attention"):
        model = tiny_model(dtype=torch.float32, attn_implementation=kind, **fields).to(device)
        assert model.config._attn_implementation == kind
        with torch.set_grad_enabled(device == "cuda"):
            loss = model(ids.to(device), document_ids=documents.to(device), labels=ids.to(device)).loss
        results.append((loss, gradients(loss, model) if device == "cuda" else {}))
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
