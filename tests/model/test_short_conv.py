"""The short convolution of keys and values: against a loop over tokens, its starts, and where it begins again."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TINY, gradients, random_ids, tiny_model, writer
from torch.testing import assert_close
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.model.short_conv import short_convolution

exact = {"rtol": 1e-12, "atol": 1e-12}
S = TINY["segment_length"]
CONVOLUTIONS = [{"short_conv": 2}, {"short_conv": S + 1}, {"embed_conv": 2}, {"short_conv": 2, "embed_conv": 2 * S + 1}]
K, V = (f"transformer.h.{{}}.attn.attention.short_conv.{name}" for name in ("k", "v"))


def token_by_token(x, weight, documents):
    """The definition: x (B, N, H, S, D), weight (w, H * D), documents (B, N, S) or None."""
    B, N, H, S, D = x.shape
    out = []
    for b in range(B):
        for n in range(N):
            for t in range(S):
                total = torch.zeros(H, D, dtype=x.dtype)
                for j in range(min(len(weight), t + 1)):
                    if documents is None or documents[b, n, t - j] == documents[b, n, t]:
                        total = total + weight[j].view(H, D) * x[b, n, :, t - j]
                out.append(total)
    return torch.stack(out).view(B, N, S, H, D).transpose(2, 3)


@given(
    st.integers(2, 5), st.integers(1, 7), st.integers(1, 3), st.sampled_from([None, 0.1, 0.5]), st.integers(0, 2**16)
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_it_equals_a_loop_over_tokens(width, S, N, change, seed):
    """Values and both gradients, also where the width exceeds the segment, in the layout that projections have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, N, S, 3, 5, dtype=torch.float64, generator=generator).transpose(2, 3).requires_grad_()
    weight = torch.randn(width, 15, dtype=torch.float64, generator=generator).requires_grad_()
    documents = None
    if change is not None:
        documents = (torch.rand(2, N * S, generator=generator) < change).long().cumsum(1).view(2, N, S)
    got, want = short_convolution(x, weight, documents), token_by_token(x, weight, documents)
    grad = torch.randn(want.shape, dtype=torch.float64, generator=generator)
    assert_close(got, want, **exact)
    assert_close(torch.autograd.grad(got, (x, weight), grad), torch.autograd.grad(want, (x, weight), grad), **exact)


@pytest.mark.parametrize("width", [2, 4])
def test_it_saves_its_input_alone(width):
    saved = []
    x, weight = torch.randn(2, 3, 2, 8, 4).requires_grad_(), torch.randn(width, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        short_convolution(x, weight)
    assert {t.untyped_storage().data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("documents", [False, True])
def test_nothing_passes_from_one_segment_or_document_to_another(documents):
    """Without the memory: the output of a token depends on its own segment and document alone."""
    model, ids = tiny_model(short_conv=3, attention_types=[[["global"], 2]]), random_ids(1, 3 * S)
    of_token = torch.arange(3 * S) // S
    given = None
    if documents:
        given = torch.tensor([[0] * 2 + [1] * 4 + [2] * 6])
        of_token = of_token * 3 + given[0]
    embeds = model.transformer.wte(ids).detach().requires_grad_()
    for t in range(3 * S):
        logits = model(inputs_embeds=embeds, document_ids=given, use_memory=False).logits
        (grad,) = torch.autograd.grad(logits[0, t].sum(), embeds)
        reached = grad[0].abs().amax(-1) > 0
        assert torch.equal(reached, (of_token == of_token[t]) & (torch.arange(3 * S) <= t))


def test_local_attention_and_memory_get_the_same_keys_and_values():
    """One layer whose weights copy: with k and v of the token before, attention at that token finds what it reads."""
    fields = {"num_layers": 1, "attention_types": [[["global"], 1]], "short_conv": 2}
    model, ids = tiny_model(**fields), random_ids(1, 2 * S)
    shifted = tiny_model(**fields)
    with torch.no_grad():
        for name in ("k", "v"):
            weight = getattr(shifted.transformer.h[0].attention.short_conv, name)
            weight[0], weight[1] = 0, 1
        plain = tiny_model(**(fields | {"short_conv": 0}))
        # The memory after the shift is that of keys and values without it, all but each segment's last token, and a
        # key and value of 0 for its first: phi(0) = 1 is added to z, nothing to M.
        attention = plain.transformer.h[0].attention
        hidden = plain.transformer.wte(ids) + plain.transformer.wpe(torch.arange(S).repeat(2))
        hidden = plain.transformer.h[0].ln_1(hidden).view(1, 2, S, -1)[:, :, :-1]
        k, v = (
            project(hidden).unflatten(-1, (2, 4)).permute(0, 3, 1, 2, 4).flatten(2, 3)
            for project in (attention.k_proj, attention.v_proj)
        )
        phi = torch.nn.functional.elu(k) + 1
        (memory,) = shifted(ids).memory
        assert_close(memory.M, phi.transpose(-1, -2) @ v, rtol=1e-9, atol=1e-9)
        assert_close(memory.z, phi.sum(-2) + 2, rtol=1e-9, atol=1e-9)
        local = [each(ids, use_memory=False).logits for each in (shifted, plain, model)]
        assert all((local[0] - other).abs().max() > 1e-2 for other in local[1:])


def test_a_new_model_starts_with_an_even_mix():
    model = InfiniGPTNeoForCausalLM(InfiniGPTNeoConfig(**TINY, short_conv=4))
    for layer in range(2):
        for name in (K, V):
            assert torch.equal(model.get_parameter(name.format(layer)), torch.full((4, 8), 0.25))


@pytest.mark.parametrize("width", [2, 3])
def test_weights_of_a_gpt_neo_get_the_identity(tmp_path, width):
    fields = {name: value for name, value in TINY.items() if name != "segment_length"} | {"initializer_range": 0.3}
    torch.manual_seed(0)
    theirs = GPTNeoForCausalLM(GPTNeoConfig(**fields)).eval()
    theirs.save_pretrained(tmp_path)
    ours, info = InfiniGPTNeoForCausalLM.from_pretrained(
        tmp_path, segment_length=16, short_conv=width, output_loading_info=True
    )
    assert {name.rpartition(".")[2] for name in info["missing_keys"]} == {"beta", "k", "v"}
    identity = torch.eye(width)[0][:, None].expand(width, 8)
    assert all(torch.equal(ours.get_parameter(name.format(1)), identity) for name in (K, V))
    plain = InfiniGPTNeoForCausalLM.from_pretrained(tmp_path, segment_length=16)
    ids = random_ids(2, 16)
    assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(random_ids(2, 50)).logits, plain(random_ids(2, 50)).logits)


def test_it_is_saved_and_loaded(tmp_path):
    model, ids = tiny_model(dtype=torch.float32, short_conv=3), random_ids(2, 15)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["short_conv"] == 3
    loaded = InfiniGPTNeoForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.short_conv == 3
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_an_export_of_an_earlier_version_has_none(tmp_path):
    model, ids = tiny_model(dtype=torch.float32), random_ids(2, 15)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("short_conv") == 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = InfiniGPTNeoForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.short_conv == 0 and not any("short_conv" in name for name in loaded.state_dict())
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["short_conv", "embed_conv"])
@pytest.mark.parametrize("width", [1, -2])
def test_a_width_of_less_than_two_is_refused(width, name):
    with pytest.raises(ValueError, match=rf"{name}={width} is no width of a convolution: give 2"):
        InfiniGPTNeoConfig(**{name: width})


@pytest.mark.parametrize(("width", "other"), [(0, 2), (2, 0), (2, 3)])
def test_the_cache_of_a_model_with_another_width_is_refused(width, other):
    ids = random_ids(1, 6)
    cache = tiny_model(short_conv=width)(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=f"with short_conv={width}, and this model has short_conv={other}"):
        tiny_model(short_conv=other)(ids, past_key_values=cache)


@pytest.mark.parametrize("position_embedding", ["segment", "rotary"])
@pytest.mark.parametrize("length", [1, S - 1, S, S + 1, 2 * S - 1, 5 * S])
@pytest.mark.parametrize("fields", CONVOLUTIONS, ids=str)
def test_generation_with_a_cache_equals_complete_forward_passes(fields, length, position_embedding):
    """Across the ends of segments. The open segment's first new token needs the cached one before it."""
    model, text = writer(**fields, position_embedding=position_embedding), random_ids(2, length)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 2 * S + 1}
    got = model.generate(text, attention_mask=torch.ones_like(text), **options)
    for _ in range(2 * S + 1):
        text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(got, text) and len(text.unique()) > 2


@pytest.mark.parametrize("fields", [{"short_conv": 3}, {"embed_conv": 6}], ids=str)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_every_strategy_gives_the_same_with_a_cache(options, fields):
    """Rows are repeated, reordered and left padded at different lengths."""
    model, ids = writer(**fields), random_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :6] = mask[1, :5] = 0
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 11} | options
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*texts)


def test_under_autocast_keys_stay_in_low_precision_and_gradients_are_near():
    model, ids = tiny_model(dtype=torch.float32, short_conv=2), random_ids(2, 23)
    want = gradients(model(ids, labels=ids).loss, model)
    seen = []
    conv = model.transformer.h[0].attention.short_conv
    conv.register_forward_hook(lambda module, inputs, outputs: seen.extend(x.dtype for x in outputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    got = gradients(loss, model)
    assert seen == [torch.bfloat16] * 2 and got[K.format(0)].dtype == torch.float32
    for name in (K, V):
        assert_close(got[name.format(1)], want[name.format(1)], rtol=0.1, atol=0.02 * want[name.format(1)].abs().max())
