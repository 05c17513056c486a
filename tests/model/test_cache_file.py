"""A cache in a file: continuing from it is never having stopped, at no cost of the text, with its own model alone."""

import copy
import json

import pytest
import torch
from gated_decay import GatedDecay
from reference import TINY, random_ids, tiny_model, writer
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from infini_ds.model import InfiniCache, MemoryRule, register_memory_rule
from infini_ds.model.memory import MemoryState, prefix_sums
from infini_ds.model.memory_rule import RULES

S = TINY["segment_length"]
exact = {"rtol": 1e-9, "atol": 1e-11}


class TwoSums(MemoryRule[tuple]):
    """A rule whose state is a plain tuple, of tensors whose shapes differ: the sum of values, and that of both."""

    name = "two_sums"

    def empty_state(self, B, H, D, dtype, device):
        return torch.zeros(B, H, D, dtype=dtype, device=device), torch.zeros(B, 2, H, D, dtype=dtype, device=device)

    def write(self, state, k, v, write_mask, memory_document, parameters):
        of_v, of_k = ((x if write_mask is None else x * write_mask[:, :, None, :, None]).sum(3) for x in (v, k))
        of_v, of_k = of_v.to(state[0].dtype), of_k.to(state[0].dtype)
        values, values_after = prefix_sums(state[0], of_v, memory_document)
        both, both_after = prefix_sums(state[1], torch.stack([of_v, of_k], dim=2), memory_document)
        return (values, both), (values_after, both_after)

    def read(self, q, before, parameters):
        return q * before[0][..., None, :] + before[1].sum(2)[..., None, :]

    def flops_per_token(self, config):
        return 0.0


@pytest.fixture(params=["linear", "softmax", "delta", "delta_paper", "gated_delta", "gated_decay", "two_sums"])
def rule(request):
    """The name of a memory rule, two of them registered from outside."""
    added = {"gated_decay": GatedDecay, "two_sums": TwoSums}.get(request.param)
    if added is not None and request.param not in RULES:
        register_memory_rule(added())
        request.addfinalizer(lambda: RULES.pop(request.param))
    return request.param


def read(model, ids, cache=None, **options):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "fields", [{}, {"position_embedding": "rotary"}, {"short_conv": 3}, {"embed_conv": 6}], ids=str
)
def test_continuing_from_a_file_is_never_having_stopped(rule, dtype, fields, tmp_path):
    """To the last bit, with rows of different lengths and documents; and it is what one forward pass gives."""
    model = tiny_model(dtype=dtype, memory_rule=rule, **fields)
    ids, mask = random_ids(2, 5 * S + 3), torch.ones(2, 5 * S + 3, dtype=torch.long)
    mask[1, : S - 1] = 0
    documents = torch.arange(5 * S + 3)[None].repeat(2, 1) // (2 * S)
    at = 4 * S + 1
    cache = read(model, ids[:, :at], attention_mask=mask[:, :at], document_ids=documents[:, :at]).past_key_values
    cache.save(tmp_path / "cache", model)
    loaded = InfiniCache.load(tmp_path / "cache", model)
    for token in ids[:, at:].split(1, dim=1):
        on, of_file = (read(model, token, some).logits for some in (cache, loaded))
        assert torch.equal(on, of_file)
    assert loaded.columns == cache.columns == ids.shape[1] and loaded.packed
    if dtype == torch.float64:
        assert_close(of_file, read(model, ids, attention_mask=mask, document_ids=documents).logits[:, -1:], **exact)


@pytest.mark.parametrize("prompt", ["question", "everything"])
@pytest.mark.parametrize(("segments", "open_tokens", "computed"), [(6, 1, 3), (6, 2, 2 * S), (60, 2, 2 * S)])
def test_generation_from_a_file_computes_nothing_of_the_text(segments, open_tokens, computed, prompt, tmp_path):
    """The question alone, or if it ends the open segment, all slots of that segment and of the next one."""
    model, counts = writer(), []
    text, question = random_ids(1, segments * S + open_tokens), random_ids(1, 3, seed=1)
    together = torch.cat([text, question], dim=1)
    want = model.generate(together, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    read(model, text).past_key_values.save(tmp_path / "cache", model)
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].numel()))
    ids = question if prompt == "question" else together
    found = model.generate(
        ids,
        past_key_values=model.load_cache(tmp_path / "cache"),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert counts[0] == computed and sum(counts[1:]) <= 2 * S + 3, "then one token a step, but where a segment ends"
    assert torch.equal(found[:, -5:], want[:, -5:])


def test_a_long_text_has_a_file_of_the_same_size(tmp_path):
    model, sizes = tiny_model(dtype=torch.float32), []
    for tokens in (1_000, 100_000):
        cache = None
        for piece in random_ids(1, tokens).split(20_000, dim=1):
            with torch.no_grad():
                cache = model.transformer(piece, past_key_values=cache, use_cache=True).past_key_values
        assert cache.columns == tokens
        cache.save(tmp_path / "cache", model)
        sizes.append((tmp_path / "cache").stat().st_size)
    assert sizes[0] == sizes[1] < 10_000


def test_copies_are_branches(tmp_path):
    """Each continues by itself, and the cache that they were copied from stays as it is."""
    model, text = writer(), random_ids(2, 3 * S + 1)
    cache = read(model, text).past_key_values
    branches = [cache.copy(), cache.copy(), copy.deepcopy(cache)]
    for seed, branch in enumerate(branches):
        more = random_ids(2, 2 * S, seed=seed)
        want = read(model, torch.cat([text, more], dim=1)).logits[:, text.shape[1] :]
        assert_close(read(model, more, branch).logits, want, **exact)
    assert cache.columns == text.shape[1] and all(branch.columns == text.shape[1] + 2 * S for branch in branches)
    branch = cache.copy()
    for tensor in (*branch.layer_caches[0].memory, branch.layer_caches[1].k, branch.open_documents, branch.ids_hash):
        tensor.fill_(7)
    more = random_ids(2, 5, seed=9)
    assert_close(read(model, more, cache).logits, read(model, torch.cat([text, more], dim=1)).logits[:, -5:], **exact)
    assert type(branch.layer_caches[0].memory) is MemoryState


def test_a_copy_of_a_cache_with_gradients():
    model, text = tiny_model(), random_ids(1, 2 * S + 1)
    branch = model(text, use_cache=True).past_key_values.copy()
    assert_close(
        model(text, past_key_values=branch).logits, model(text.repeat(1, 2)).logits[:, text.shape[1] :], **exact
    )


def test_the_cache_of_another_model_is_refused(tmp_path):
    model, file = tiny_model(), tmp_path / "book.memory"
    read(model, random_ids(1, 9)).past_key_values.save(file, model)
    for other, difference in (
        (tiny_model(seed=1), "other weights than this one's (another model, or another step of its training)"),
        (tiny_model(memory_rule="delta"), "memory_rule=linear, and this model has memory_rule=delta"),
        (tiny_model(short_conv=2), "short_conv=0, and this model has short_conv=2"),
        (tiny_model(embed_conv=2), "embed_conv=0, and this model has embed_conv=2"),
        (tiny_model(segment_length=S + 1), f"segment_length={S}, and this model has segment_length={S + 1}"),
        (tiny_model(layer_norm_epsilon=1e-3), "layer_norm_epsilon=1e-05, and this model has layer_norm_epsilon=0.001"),
        (tiny_model(window_size=2), "window_size=3, and this model has window_size=2"),
        (tiny_model(dtype=torch.float32), "dtype=float64, and this model has dtype=float32"),
    ):
        with pytest.raises(ValueError) as error:
            InfiniCache.load(file, other)
        assert str(error.value).startswith(f"{file} is the cache of a model with ") and difference in str(error.value)
        assert str(error.value).endswith(
            ": give the model that it was saved with, or read the text again with this one"
        )
    with torch.no_grad():
        model.transformer.h[1].attention.beta[0] += 1e-6
    with pytest.raises(ValueError, match="other weights"):
        InfiniCache.load(file, model)
    with pytest.raises(ValueError, match="memory_rule=linear, and this model has memory_rule=delta"):
        read(tiny_model(), random_ids(1, 9)).past_key_values.save(file, tiny_model(memory_rule="delta"))


def test_the_output_layer_has_no_influence(tmp_path):
    model = writer()
    read(model, random_ids(1, 9)).past_key_values.save(tmp_path / "cache", model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert InfiniCache.load(tmp_path / "cache", model).columns == 9
    assert InfiniCache.load(tmp_path / "cache", model.transformer).columns == 9


def test_damaged_files_are_one_sentence(tmp_path):
    model, file = tiny_model(), tmp_path / "cache"
    read(model, random_ids(1, 9)).past_key_values.save(file, model)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "no partial file stays"
    content = file.read_bytes()
    metadata = {"format": "infini_cache", "version": "2", "model": json.dumps({})}
    for damage, words in (
        (content[: len(content) // 2], "cache is damaged, or not a saved cache ("),
        (b"", "cache is damaged, or not a saved cache ("),
        (b"It was a bright cold day in April", "cache is damaged, or not a saved cache ("),
    ):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match="read the text again") as error:
            InfiniCache.load(file, model)
        assert words in str(error.value)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"is not a saved cache: give a file that InfiniCache\.save wrote"):
        InfiniCache.load(file, model)
    save_file({"a": torch.zeros(1)}, file, metadata)
    with pytest.raises(ValueError, match="has format infini_cache 2, and this code reads infini_cache up to 1"):
        InfiniCache.load(file, model)
    with pytest.raises(FileNotFoundError):
        InfiniCache.load(tmp_path / "none", model)


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    model, file = tiny_model(), tmp_path / "cache"
    cache = read(model, random_ids(1, 9)).past_key_values
    cache.save(file, model)
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    read(model, random_ids(1, 5), cache)
    with pytest.raises(OSError, match="No space left"):
        cache.save(file, model)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"] and file.read_bytes() == before
    assert load_file(file)["counts"].tolist()[0] == 9


def test_a_text_given_as_embeddings(tmp_path):
    """Its ids are not known, so the hash that tells a changed prompt is absent, and stays so."""
    model, ids = tiny_model(), random_ids(1, 9)
    with torch.no_grad():
        cache = model(inputs_embeds=model.transformer.wte(ids), use_cache=True).past_key_values
    cache.save(tmp_path / "cache", model)
    loaded = InfiniCache.load(tmp_path / "cache", model)
    assert loaded.ids_hash is None and torch.equal(read(model, ids, loaded).logits, read(model, ids, cache).logits)
