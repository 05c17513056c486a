"""generate(): with a cache as without, for every strategy and prompt length, without a limit."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import TINY, random_ids, writer
from torch.testing import assert_close
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from infini_ds.model.cache import CACHE_NAME

S = TINY["segment_length"]


def generate(model, ids, new_tokens=2 * S + 1, mask=None, **options):
    """Return the new tokens only, never ended early; greedy by default."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **options)
    return out[:, ids.shape[1] :]


def greedy(model, ids, new_tokens):
    """Return greedy tokens by complete forward passes, without generate() and cache."""
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, -new_tokens:]


def left_padded(prompts, width=None):
    """Return (ids, mask) of prompts (1, T) of different lengths in one batch."""
    width = width or max(p.shape[1] for p in prompts)
    ids = torch.cat([F.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([F.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    return ids, mask


@pytest.mark.parametrize("position_embedding", ["segment", "rotary"])
@pytest.mark.parametrize("length", [1, S - 1, S, S + 1, 2 * S - 1, 2 * S, 2 * S + 1, 5 * S])
def test_cached_equals_uncached_around_segment_ends(position_embedding, length):
    model, ids = writer(position_embedding=position_embedding, segments_per_block=2), random_ids(2, length)
    want = greedy(model, ids, 2 * S + 1)
    assert torch.equal(generate(model, ids), want)
    assert torch.equal(generate(model, ids, use_cache=False), want)
    assert len(want.unique()) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 5},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=str,
)
def test_every_strategy_gives_the_same_with_a_cache(options):
    """Rows are repeated, reordered and left padded at different lengths."""
    model = writer()
    ids, mask = left_padded([random_ids(1, 3, seed=1), random_ids(1, 9, seed=2), random_ids(1, S, seed=3)])
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(generate(model, ids, mask=mask, use_cache=use_cache, new_tokens=11, **options))
    assert torch.equal(*results)
    assert len(results[0]) == 3 * options.get("num_return_sequences", 1)


def test_beam_search_scores_its_text_correctly():
    """Tests the cache's reordering: beams with mixed-up memories would score their text wrongly."""
    model, ids = writer(), random_ids(1, 6)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=7,
        num_beams=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        length_penalty=1.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    logits = model(out.sequences).logits[:, 5:-1].log_softmax(-1)
    score = logits.gather(2, out.sequences[:, 6:, None]).sum() / 7
    assert_close(out.sequences_scores[0].double(), score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [None, 30])
@pytest.mark.parametrize("use_cache", [True, False])
def test_each_prompt_of_a_batch_gives_what_it_gives_alone(width, use_cache):
    """Even if the padding is longer than several segments."""
    model = writer()
    prompts = [random_ids(1, length, seed=length) for length in (1, S - 1, S, 2 * S + 1, 13)]
    ids, mask = left_padded(prompts, width)
    batch = generate(model, ids, mask=mask, use_cache=use_cache)
    for row, prompt in zip(batch, prompts, strict=True):
        assert torch.equal(row, greedy(model, prompt, 2 * S + 1)[0])


def test_short_prompts_after_much_padding():
    """All tokens fit into one segment, but their columns do not."""
    model = writer()
    prompts = [random_ids(1, length, seed=length) for length in (1, 2)]
    ids, mask = left_padded(prompts, width=3 * S)
    for row, prompt in zip(generate(model, ids, mask=mask), prompts, strict=True):
        assert torch.equal(row, greedy(model, prompt, 2 * S + 1)[0])


def test_generation_continues_from_a_cache():
    model, ids = writer(), random_ids(2, 14)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))


def test_generated_text_belongs_to_the_last_document():
    model, ids = writer(), random_ids(2, 10)
    documents = torch.tensor([[0] * 4 + [1] * 6, [0] * 8 + [3] * 2])
    alone = [generate(model, ids[:1, 4:])]  # document 1 starts with a segment, as in a row of its own
    for use_cache in (True, False):
        got = generate(model, ids, document_ids=documents, use_cache=use_cache)
        assert torch.equal(got[:1], alone[0])
        text, docs = ids, documents
        for _ in range(got.shape[1]):
            token = model(text, document_ids=docs).logits[:, -1].argmax(-1, keepdim=True)
            text, docs = torch.cat([text, token], dim=1), torch.cat([docs, docs[:, -1:]], dim=1)
        assert torch.equal(got, text[:, 10:])


def test_generation_without_memory():
    """Then nothing before the open segment matters: the text is that of the segment alone."""
    model, ids = writer(), random_ids(2, 3 * S)
    got = generate(model, ids, use_memory=False, new_tokens=S)
    assert torch.equal(got, generate(model, ids, use_memory=False, use_cache=False, new_tokens=S))
    other = torch.cat([random_ids(2, 2 * S, seed=9), ids[:, 2 * S :]], dim=1)
    assert torch.equal(got, generate(model, other, use_memory=False, new_tokens=S))
    assert not torch.equal(generate(model, ids, new_tokens=S), generate(model, other, new_tokens=S))


def test_each_step_computes_one_token(monkeypatch):
    """The work of a step does not grow with the text."""
    model, widths = writer(), []
    block = model.transformer.forward_block
    monkeypatch.setattr(
        model.transformer, "forward_block", lambda x, *args: (widths.append(tuple(x.shape[:2])), block(x, *args))[1]
    )
    generate(model, random_ids(2, 2 * S), new_tokens=30)
    assert widths == [(2, 2 * S)] + [(2, 1)] * 29


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_generate_receives_the_cache(options):
    """It embeds the prompt once and then one token a step and row, whichever name transformers has for the cache.

    The prompt fills its segments, since the slots after it are embedded too.
    """
    model, counts = writer(), []
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].numel()))
    prompt, new, rows = random_ids(1, 3 * S), 11, options.get("num_beams", 1)
    out = generate(model, prompt, new_tokens=new, **options)
    assert out.shape[1] == new
    assert sum(counts) == rows * (prompt.numel() + new - 1)


def test_the_cache_has_two_names():
    """The output's field has the name of this version of transformers; arguments may have either one."""
    model, ids = writer(), random_ids(2, 9)
    with torch.no_grad():
        first = [model(ids[:, :6], use_cache=True) for _ in range(2)]
        assert first[0].cache is first[0].past_key_values and CACHE_NAME in first[0]
        assert list(first[0]) == ["logits", CACHE_NAME, "memory"]
        one = model(ids[:, 6:], cache=first[0].cache).logits
        other = model.transformer(ids[:, 6:], past_key_values=first[1].cache).last_hidden_state
        assert_close(model.lm_head(other), one, rtol=0, atol=1e-12)
        assert_close(one, model(ids).logits[:, 6:], rtol=0, atol=1e-10)
        with pytest.raises(ValueError, match="two names of one argument"):
            model(ids, past_key_values=first[0].cache, cache=first[1].cache)
    for name in ("cache", "past_key_values"):
        cache = model(ids[:, :6], use_cache=True).cache
        assert torch.equal(generate(model, ids, **{name: cache}), generate(model, ids))


def test_text_streams():
    class Streamer(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, ids, streamer = writer(), random_ids(1, 7), Streamer()
    new = generate(model, ids, streamer=streamer)
    assert streamer.ended and streamer.tokens == ids[0].tolist() + new[0].tolist()


def test_generation_ends_at_the_end_of_text():
    model, ids = writer(), random_ids(1, 6)
    free = generate(model, ids, new_tokens=20)[0].tolist()
    end = free[7]
    ended = generate(model, ids, new_tokens=20, eos_token_id=end)[0].tolist()
    assert ended == free[: free.index(end) + 1]


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "itself"}])
def test_assisted_generation_is_rejected(options):
    model, ids = writer(), random_ids(1, 3).repeat(1, 4)
    if "assistant_model" in options:
        options = {"assistant_model": writer()}
    with pytest.raises(ValueError, match=r"assisted generation is not supported with stateful models.*InfiniGPTNeo"):
        generate(model, ids, **options)


@pytest.fixture
def quiet(caplog):
    """Fail on any warning, by `warnings` or by transformers' loggers."""
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        yield
    logger.propagate = propagate
    assert [record.getMessage() for record in caplog.get_records("call")] == []


@pytest.mark.parametrize("use_cache", [True, False])
def test_no_limit_at_max_position_embeddings(quiet, use_cache):
    # A value that no other test uses, because transformers warns only once for each.
    model = writer(max_position_embeddings=40 + use_cache)
    ids = random_ids(1, 38)
    assert generate(model, ids, new_tokens=12, use_cache=use_cache).shape == (1, 12)


@pytest.mark.parametrize("length", [5, 30, 32, 50])
def test_without_a_length_20_tokens_are_generated(quiet, length):
    model, ids = writer(), random_ids(1, length)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(out[:, length:], generate(model, ids, new_tokens=20))


def test_a_given_length_is_kept():
    model, ids = writer(), random_ids(1, 40)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(ids, max_length=47, **options).shape == (1, 47)
    config = GenerationConfig(max_length=45, do_sample=False, pad_token_id=0)
    assert model.generate(ids, generation_config=config, attention_mask=options["attention_mask"]).shape == (1, 45)
