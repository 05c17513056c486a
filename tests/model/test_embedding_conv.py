"""The convolution of embeddings: against a loop over tokens, across segment ends, in blocks, and with a cache.

That the complete model equals its reference in fp64, with documents and padding anywhere, is in test_model.py, and in
pieces with a cache in test_generation.py and test_decoding.py, whose models have one in half of the cases. What it
shares with the short convolution, generate() for example, is in test_short_conv.py.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TINY, gradients, random_ids, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.model.cache import InfiniCache
from infini_ds.model.embedding_conv import EmbeddingConvolution

exact = {"rtol": 1e-12, "atol": 1e-12}
S = TINY["segment_length"]
WEIGHT = "transformer.embed_conv.weight"


@given(st.integers(2, 9), st.integers(1, 12), st.sampled_from([None, 0.2, 0.6]), st.integers(0, 2**16))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_it_equals_a_loop_over_tokens(width, n, change, seed):
    generator = torch.Generator().manual_seed(seed)
    module = EmbeddingConvolution(InfiniGPTNeoConfig(**TINY, embed_conv=width)).double()
    embeds = torch.randn(2, width - 1 + n, 8, dtype=torch.float64, generator=generator)
    documents = None
    if change is not None:
        documents = (torch.rand(2, width - 1 + n, generator=generator) < change).long().cumsum(1)
    want = torch.zeros(2, n, 8, dtype=torch.float64)
    for b in range(2):
        for t in range(n):
            at = t + width - 1
            for j in range(width):
                if documents is None or documents[b, at - j] == documents[b, at]:
                    want[b, t] += module.weight[j].detach() * embeds[b, at - j]
    assert_close(module(embeds, documents).detach(), want, **exact)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [3, S + 3])
def test_a_token_knows_the_tokens_before_its_segment_and_none_of_other_documents(width, packed):
    """Without the memory: besides its own segment, the width - 1 tokens before the segment, of its document alone."""
    model, ids = tiny_model(embed_conv=width, attention_types=[[["global"], 2]]), random_ids(1, 4 * S)
    position = torch.arange(4 * S)
    documents = torch.tensor([[0] * 2 + [1] * 8 + [2] * 6]) if packed else None
    document = torch.zeros_like(position) if documents is None else documents[0]
    embeds = model.transformer.wte(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, document_ids=documents, use_memory=False).logits
    for t in range(4 * S):
        (grad,) = torch.autograd.grad(logits[0, t].sum(), embeds, retain_graph=True)
        first = t // S * S - (width - 1)
        within = (position <= t) & (position >= first) & (document == document[t])
        assert torch.equal(grad[0].abs().amax(-1) > 0, within), t


@pytest.mark.parametrize("segments_per_block", [1, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_blocks_give_what_one_pass_gives(given, checkpointing, segments_per_block):
    """Logits and all gradients, those of embeddings that were given included, wherever blocks end."""
    ids, documents = random_ids(2, 5 * S + 1), torch.arange(5 * S + 1)[None].repeat(2, 1) // (2 * S + 1)
    found = []
    for blocks in (None, segments_per_block):
        model = tiny_model(embed_conv=S + 2, segments_per_block=blocks)
        if checkpointing and blocks:
            model.train().gradient_checkpointing_enable()
        embeds = model.transformer.wte(ids).detach().requires_grad_()
        inputs = {"input_ids": ids} if given == "ids" else {"inputs_embeds": embeds}
        output = model(**inputs, document_ids=documents, labels=ids, return_logits=True)
        of_embeds = torch.autograd.grad(output.loss, embeds, retain_graph=True) if given == "embeddings" else ()
        found.append((output.logits, of_embeds, gradients(output.loss, model)))
    assert_close(*found, rtol=1e-9, atol=1e-11)


def test_a_new_model_starts_with_weights_that_tell_places_apart():
    torch.manual_seed(0)
    config = InfiniGPTNeoConfig(**TINY | {"hidden_size": 256}, embed_conv=4)
    weight = InfiniGPTNeoForCausalLM(config).get_parameter(WEIGHT).detach()
    assert torch.equal(weight[0], torch.ones(256))
    assert float(weight[1:].std()) == pytest.approx(0.5, rel=0.1) and abs(weight[1:].mean()) < 0.1


def test_weights_of_a_gpt_neo_get_the_identity(tmp_path):
    fields = {name: value for name, value in TINY.items() if name != "segment_length"} | {"initializer_range": 0.3}
    torch.manual_seed(0)
    theirs = GPTNeoForCausalLM(GPTNeoConfig(**fields)).eval()
    theirs.save_pretrained(tmp_path)
    ours = InfiniGPTNeoForCausalLM.from_pretrained(tmp_path, segment_length=16, embed_conv=5)
    assert torch.equal(ours.get_parameter(WEIGHT), torch.eye(5)[0][:, None].expand(5, 8))
    ids = random_ids(2, 16)
    assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_it_is_saved_and_loaded_and_exports_of_earlier_versions_have_none(tmp_path):
    for width in (5, 0):
        model, ids, folder = tiny_model(dtype=torch.float32, embed_conv=width), random_ids(2, 15), tmp_path / str(width)
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["embed_conv"] == width
        if not width:
            del config["embed_conv"]
            (folder / "config.json").write_text(json.dumps(config))
        loaded = InfiniGPTNeoForCausalLM.from_pretrained(folder)
        assert loaded.config.embed_conv == width and (WEIGHT in loaded.state_dict()) == bool(width)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_embeddings_that_are_given_continue_in_a_cache():
    """One piece of ids, one of embeddings, one token of each: what one pass over all ids gives."""
    model, ids = tiny_model(embed_conv=6), random_ids(2, 3 * S + 2)
    cache, logits = None, []
    for number, piece in enumerate(ids.split([S + 1, S, 1, S - 1, 1], dim=1)):
        given = {"inputs_embeds": model.transformer.wte(piece)} if number % 2 else {"input_ids": piece}
        with torch.no_grad():
            output = model(**given, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1), model(ids).logits.detach(), rtol=1e-9, atol=1e-11)
    assert torch.equal(cache.last_embeds, model.transformer.wte(ids[:, -5:]).detach())


def test_a_new_document_after_a_cache_knows_nothing_of_the_one_before():
    model, ids = tiny_model(embed_conv=6), random_ids(2, 2 * S + 3)
    documents = torch.zeros_like(ids)
    documents[1, S + 1 :] = 1
    with torch.no_grad():
        cache = model(ids[:, : S + 1], document_ids=documents[:, : S + 1], use_cache=True).past_key_values
        later = model(ids[:, S + 1 :], document_ids=documents[:, S + 1 :], past_key_values=cache).logits
        want = model(ids, document_ids=documents).logits[:, S + 1 :]
    assert_close(later, want, rtol=1e-9, atol=1e-11)


def test_an_emptied_cache_is_a_new_one():
    model, ids = tiny_model(embed_conv=6), random_ids(2, 2 * S + 3)
    with torch.no_grad():
        cache = model(random_ids(2, 7, seed=3), use_cache=True).past_key_values
        before = cache.nbytes()
        cache.reset()
        assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, rtol=1e-9, atol=1e-11)
    plain = tiny_model()(ids, use_cache=True).past_key_values.nbytes()
    assert cache.nbytes() == before == plain + 2 * 5 * 8 * 8  # two rows, five tokens, width 8, fp64


def test_a_cache_file_of_an_earlier_version_is_read(tmp_path):
    model, ids = tiny_model(), random_ids(2, 2 * S + 1)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.save(tmp_path / "new", model)
        with safe_open(tmp_path / "new", "pt") as file:
            metadata = file.metadata()
        described = json.loads(metadata["model"])
        assert described.pop("embed_conv") == 0
        metadata["model"] = json.dumps(described)
        save_file(load_file(tmp_path / "new"), tmp_path / "old", metadata)
        loaded = InfiniCache.load(tmp_path / "old", model)
        assert torch.equal(*(model(ids, past_key_values=each).logits for each in (loaded, cache)))
