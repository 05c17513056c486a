"""Caches that are not this model's are refused, and `generate()` reads exactly the new tokens after one that is."""

import pytest
import torch
from reference import TINY, random_ids, tiny_model, writer
from torch.testing import assert_close
from transformers import DynamicCache, GenerationConfig

from infini_ds.model import InfiniCache

exact = {"rtol": 1e-9, "atol": 1e-11}
S = TINY["segment_length"]
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": S + 3}


def cache_of(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=True, **options).past_key_values


def read_tokens(model, monkeypatch):
    """Return a list that gets the ids (B, T) of each call of the layers."""
    read, embed = [], model.transformer.wte.forward
    monkeypatch.setattr(model.transformer.wte, "forward", lambda ids: (read.append(ids.clone()), embed(ids))[1])
    return read


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"segment_length": 2 * S}, f"segment_length={2 * S}, and this model has segment_length={S}"),
        ({"num_layers": 4, "attention_types": [[["global", "local"], 2]]}, "num_layers=4"),
        ({"num_heads": 1}, "num_heads=1"),
        ({"memory_rule": "delta"}, "memory_rule=delta, and this model has memory_rule=linear"),
        ({"position_embedding": "rotary"}, "position_embedding=rotary"),
        ({"dtype": torch.float32}, "dtype=torch.float32, and this model has dtype=torch.float64"),
    ],
)
def test_a_cache_of_another_model(fields, sentence):
    ids = random_ids(2, 9)
    cache = cache_of(tiny_model(**fields), ids)
    with pytest.raises(ValueError, match=sentence):
        tiny_model()(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=sentence):
        tiny_model().generate(ids, past_key_values=cache, **OPTIONS)


def test_a_cache_of_another_batch():
    model, ids = tiny_model(), random_ids(2, 9)
    with pytest.raises(ValueError, match="holds 2 rows, and the input has 3"):
        model(random_ids(3, 1), past_key_values=cache_of(model, ids))
    with pytest.raises(ValueError, match="holds 2 rows, and the input has 4"):
        model.generate(random_ids(4, 1), past_key_values=cache_of(model, ids), **OPTIONS)


def test_a_cache_of_transformers():
    model, ids = tiny_model(), random_ids(1, 9)
    for run in (model, model.transformer, lambda ids, **options: model.generate(ids, **OPTIONS, **options)):
        with pytest.raises(ValueError, match=r"DynamicCache, which holds keys and values of all tokens.* InfiniCache"):
            run(ids, past_key_values=DynamicCache())


@pytest.mark.parametrize("document", [1, 5, 2 * S + 3])
@pytest.mark.parametrize("question", [1, 4, 3 * S])
@pytest.mark.parametrize("complete", [False, True])
def test_a_question_after_a_document(document, question, complete, monkeypatch):
    """Alone or after the document's own ids, shorter or longer than it: the same text, from the same tokens."""
    model, text = writer(), random_ids(2, document + question)
    want = model.generate(text, **OPTIONS)[:, text.shape[1] :]
    assert want.unique().numel() > 2
    cache = cache_of(model, text[:, :document])
    prompt = text if complete else text[:, document:]
    read = read_tokens(model, monkeypatch)
    got = model.generate(prompt, past_key_values=cache, **OPTIONS)
    assert torch.equal(got[:, : prompt.shape[1]], prompt)
    assert torch.equal(got[:, prompt.shape[1] :], want)
    assert [x.shape[1] for x in read[1:]] == [1] * (OPTIONS["max_new_tokens"] - 1)
    if read[0].shape[1] == question:  # an incremental call has the new tokens alone, any other one all slots
        assert torch.equal(read[0], text[:, document:])
    assert cache.columns == document + question + OPTIONS["max_new_tokens"] - 1


def test_a_conversation():
    """Turns after a document: with the new text alone, or with all text since the first question."""
    model = writer()
    document, first, second, third = (random_ids(2, n) for n in (11, 3, 4, 20))
    cache = cache_of(model, document)
    answer = model.generate(first, past_key_values=cache, **OPTIONS)  # the cache lacks the last token of the answer
    prompt = torch.cat([answer, second], dim=1)
    again = model.generate(prompt, past_key_values=cache, **OPTIONS)
    want = model.generate(torch.cat([document, prompt], dim=1), **OPTIONS)[:, document.shape[1] :]
    assert torch.equal(again, want)
    alone = torch.cat([again[:, -1:], third], dim=1)
    last = model.generate(alone, past_key_values=cache, **OPTIONS)[:, alone.shape[1] :]
    complete = torch.cat([document, again, third], dim=1)
    assert torch.equal(last, model.generate(complete, **OPTIONS)[:, complete.shape[1] :])
    # All text since the document's beginning is understood too.
    text = torch.cat([complete, last, second], dim=1)
    got = model.generate(text, past_key_values=cache, **OPTIONS)
    assert torch.equal(got, model.generate(text, **OPTIONS))


def test_questions_of_different_lengths_after_a_document():
    model, document, long = writer(), random_ids(2, 7), random_ids(2, 6)
    mask = torch.ones_like(long)
    mask[0, :4] = 0
    want = [
        model.generate(torch.cat([document[i], long[i][mask[i] == 1]])[None], **OPTIONS)[
            0, -OPTIONS["max_new_tokens"] :
        ]
        for i in range(2)
    ]
    for given in (mask, torch.cat([torch.ones_like(document), mask], dim=1)):
        cache = cache_of(model, document)
        got = model.generate(long, attention_mask=given, past_key_values=cache, **OPTIONS)
        assert torch.equal(got[:, long.shape[1] :], torch.stack(want))


def test_beams_after_a_document():
    model, document, question = writer(), random_ids(2, 7), random_ids(2, 4)
    beams = OPTIONS | {"num_beams": 3, "num_return_sequences": 2}
    want = model.generate(torch.cat([document, question], dim=1), **beams)[:, 7:]
    assert torch.equal(model.generate(question, past_key_values=cache_of(model, document), **beams), want)


def test_an_ambiguous_prompt_is_refused():
    model, text = writer(), random_ids(1, 40)
    cache = cache_of(model, text[:, :30])
    changed = text.clone()
    changed[0, 28] = (changed[0, 28] + 1) % model.config.vocab_size  # a tokenizer that joins words across the border
    with pytest.raises(ValueError, match="begins like the text in the cache, and then differs"):
        model.generate(changed, past_key_values=cache, **OPTIONS)
    with pytest.raises(ValueError, match="holds all 30 tokens of the prompt already"):
        model.generate(text[:, :30], past_key_values=cache, **OPTIONS)
    with torch.no_grad():
        embeds = model.transformer.wte(text[:, :30])
        cache = model(inputs_embeds=embeds, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="given as embeddings"):
        model.generate(text, past_key_values=cache, **OPTIONS)
    want = model.generate(text, **OPTIONS)[:, 40:]
    assert torch.equal(model.generate(text[:, 30:], past_key_values=cache, **OPTIONS)[:, 10:], want)


@pytest.mark.parametrize("chunk", [1, 3, S, 1000])
@pytest.mark.parametrize("by_config", [False, True])
def test_prompts_in_chunks(chunk, by_config, monkeypatch):
    model, ids = writer(), random_ids(2, 2 * S + 3)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    want = model.generate(ids, attention_mask=mask, **OPTIONS)
    read = read_tokens(model, monkeypatch)
    given = {"prefill_chunk_size": chunk}
    if by_config:
        given = {"generation_config": GenerationConfig(**given)}
    assert torch.equal(model.generate(ids, attention_mask=mask, **OPTIONS, **given), want)
    pieces = -(-(ids.shape[1] - 1) // chunk)
    assert len(read) == pieces + OPTIONS["max_new_tokens"]
    beams = OPTIONS | {"num_beams": 2}
    want = model.generate(ids, attention_mask=mask, **beams)
    assert torch.equal(model.generate(ids, attention_mask=mask, **beams, **given), want)
    cache = cache_of(model, ids[:, :5], attention_mask=mask[:, :5])
    got = model.generate(ids[:, 5:], attention_mask=mask, past_key_values=cache, **OPTIONS, **given)
    assert torch.equal(
        got[:, -OPTIONS["max_new_tokens"] :], model.generate(ids, attention_mask=mask, **OPTIONS)[:, ids.shape[1] :]
    )


def test_a_cache_that_was_emptied_is_new():
    model, ids = writer(), random_ids(2, 20)
    cache = cache_of(model, ids)
    assert isinstance(cache, InfiniCache)
    cache.reset()
    assert torch.equal(model.generate(ids, past_key_values=cache, **OPTIONS), model.generate(ids, **OPTIONS))


def test_embeddings_in_generate():
    model, ids = writer(), random_ids(2, 2 * S + 1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    want = model.generate(ids, attention_mask=mask, **OPTIONS)[:, ids.shape[1] :]
    embeds = model.transformer.wte(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **OPTIONS), want)
    got = model.generate(ids, inputs_embeds=embeds, attention_mask=mask, **OPTIONS)
    assert torch.equal(got[:, ids.shape[1] :], want)
    assert_close(model(inputs_embeds=embeds).logits, model(ids).logits, **exact)
