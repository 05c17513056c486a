"""Generation: with a cache as without, however the text comes, and with constant memory."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from reference import TINY, random_ids, reference_forward, tiny_model
from strategies import texts_in_pieces
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from infini_ds.model import BlockSchedule, InfiniCache

many = settings(deadline=None, max_examples=60, derandomize=True)
exact = {"rtol": 1e-9, "atol": 1e-11}
S = TINY["segment_length"]


def generate(model, ids, new_tokens=2 * S + 1, mask=None, **options):
    """Only the new tokens, never ended early; greedy unless told otherwise."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **options)
    return out[:, ids.shape[1] :]


def greedy(model, ids, new_tokens):
    """One token after the other by whole forward passes, no generate() and no cache."""
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, -new_tokens:]


def writer(**fields):
    """A tiny model whose greedy text is lively: with tied embeddings a random model repeats one token."""
    return tiny_model(seed=26, tie_word_embeddings=False, **fields)


def left_padded(prompts, width=None):
    """(ids, mask) of prompts (1, T) of different lengths in one batch."""
    width = width or max(p.shape[1] for p in prompts)
    ids = torch.cat([F.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([F.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    return ids, mask


# ---- the cache


@given(texts_in_pieces())
@many
def test_a_text_in_pieces_gives_what_it_gives_at_once(text):
    model, ids, mask, documents, pieces = text
    cache, logits = None, []
    with torch.no_grad():
        whole = model(ids, mask, documents).logits
        for piece in pieces:
            some = None if documents is None else documents[:, piece]
            out = model(ids[:, piece], mask[:, piece], some, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        reference = reference_forward(model, ids, mask, documents)[0]
    valid = mask.bool()
    assert_close(torch.cat(logits, dim=1)[valid], whole[valid], **exact)
    assert_close(whole[valid], reference[valid], **exact)
    assert cache.get_seq_length() == ids.shape[1]


@given(texts_in_pieces())
@many
def test_labels_of_a_piece_count_inside_the_piece(text):
    """Tokens before the piece are not predicted from again, and padding is not a label."""
    model, ids, mask, documents, pieces = text
    cache = None
    with torch.no_grad():
        for piece in pieces:
            inputs = (ids[:, piece], mask[:, piece], None if documents is None else documents[:, piece])
            labels = ids[:, piece]
            out = model(*inputs, labels=labels, past_key_values=cache, use_cache=True, loss_reduction="sum")
            cache = out.past_key_values
            want = torch.zeros((), dtype=out.logits.dtype)
            for b in range(len(ids)):
                columns = mask[b, piece].nonzero().flatten()
                want += F.cross_entropy(out.logits[b, columns[:-1]], labels[b, columns[1:]], reduction="sum")
            assert_close(out.loss, want, **exact)


@pytest.mark.parametrize("position_embedding", ["segment", "rotary"])
@pytest.mark.parametrize("pieces", [[23], [1] * 23, [3, 1, 4, 15], [4, 4, 15], [5, 5, 13]])
def test_autocast_goes_on_from_a_cache(position_embedding, pieces):
    model, ids = tiny_model(dtype=torch.float32, position_embedding=position_embedding), random_ids(2, 23)
    cache, logits = None, []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(ids).logits
        for piece in ids.split(pieces, dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    assert {x.dtype for layer in cache.layer_caches for x in layer.memory} == {torch.float32}
    assert_close(torch.cat(logits, dim=1), want, rtol=0.02, atol=0.1)


def test_without_a_document_the_last_one_goes_on():
    model, ids = tiny_model(), random_ids(1, 15)
    documents = torch.tensor([[2] * 3 + [6] * 12])
    with torch.no_grad():
        cache = model(ids[:, :9], document_ids=documents[:, :9], use_cache=True).past_key_values
        assert_close(
            model(ids[:, 9:], past_key_values=cache).logits, model(ids, document_ids=documents).logits[:, 9:], **exact
        )


def cache_bytes(cache: InfiniCache) -> int:
    tensors = [cache.open_documents, cache.memory_document]
    tensors += [x for layer in cache.layer_caches for x in (*layer.memory, layer.k, layer.v)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def test_the_cache_does_not_grow():
    model, ids = tiny_model(), random_ids(2, 5 * S + 1)
    sizes = set()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        for token in random_ids(2, 40).split(1, dim=1):
            cache = model(token, past_key_values=cache).past_key_values
            sizes.add(cache_bytes(cache))
        assert len(sizes) == 1
        for blocks in (None, 1, 3):  # nor does it hold on to the intermediate states of a long prompt
            model.block_schedule = BlockSchedule(blocks)
            size = cache_bytes(model(random_ids(2, 50 * S + 1), use_cache=True).past_key_values)
            assert size <= max(sizes) + 2 * 51 * 8  # `held` of 50 segments


class HostReads(TorchDispatchMode):
    """Counts the numbers that the host asks of the device, each of which would make it wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_token_is_computed_without_asking_the_device():
    """Only where the fullest row's open segment is full, once for each row."""
    model, prompt = writer(segment_length=8), random_ids(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        cache = model(prompt, mask, use_cache=True).past_key_values
        counts = []
        for _ in range(16):
            with HostReads() as reads:
                model(prompt[:, :1], past_key_values=cache)
            counts.append(reads.count)
    # Rows of 5 and 3 tokens: the first is full before tokens 4 and 12, the second before 6 and 14 (counted from 1).
    assert [number for number, count in enumerate(counts, start=1) if count] == [4, 6, 12, 14]


def test_a_reset_cache_is_a_new_one():
    model, ids, other = tiny_model(), random_ids(2, 11, seed=1), random_ids(2, 13, seed=2)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_close(model(other, past_key_values=cache).logits, model(other).logits, **exact)


def test_rows_of_a_cache_can_be_chosen_and_repeated():
    model, ids, more = tiny_model(), random_ids(3, 10), random_ids(3, 9, seed=5)
    with torch.no_grad():
        want = model(torch.cat([ids, more], dim=1)).logits[:, 10:]
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([4, 0, 3, 1]))  # rows 2, 0, 1, 0
        rows = [2, 0, 1, 0]
        assert_close(model(more[rows], past_key_values=cache).logits, want[rows], **exact)


def test_a_cache_cannot_be_cropped():
    cache = tiny_model()(random_ids(1, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"cannot forget its last tokens.*generate without an assistant"):
        cache.crop(5)


def test_no_cache_under_gradient_checkpointing():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="use_cache=True is not possible while training with gradient checkpointing"):
        model(random_ids(1, 5), use_cache=True)
    assert model.eval()(random_ids(1, 5), use_cache=True).past_key_values is not None


# ---- generate()


@pytest.mark.parametrize("position_embedding", ["segment", "rotary"])
@pytest.mark.parametrize("length", [1, S - 1, S, S + 1, 2 * S - 1, 2 * S, 2 * S + 1, 5 * S])
def test_cached_is_uncached_around_segment_ends(position_embedding, length):
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
def test_every_strategy_is_the_same_with_a_cache(options):
    """Rows are repeated, reordered and left padded at different lengths."""
    model = writer()
    ids, mask = left_padded([random_ids(1, 3, seed=1), random_ids(1, 9, seed=2), random_ids(1, S, seed=3)])
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(generate(model, ids, mask=mask, use_cache=use_cache, new_tokens=11, **options))
    assert torch.equal(*results)
    assert len(results[0]) == 3 * options.get("num_return_sequences", 1)


def test_beam_search_finds_more_likely_text_than_greedy():
    """Of the cache's reordering: beams that mixed up their rows' memories would score their text wrongly."""
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
def test_prompts_of_different_lengths_give_what_each_gives_alone(width, use_cache):
    """Also where padding alone is longer than many segments."""
    model = writer()
    prompts = [random_ids(1, length, seed=length) for length in (1, S - 1, S, 2 * S + 1, 13)]
    ids, mask = left_padded(prompts, width)
    batch = generate(model, ids, mask=mask, use_cache=use_cache)
    for row, prompt in zip(batch, prompts, strict=True):
        assert torch.equal(row, greedy(model, prompt, 2 * S + 1)[0])


def test_short_prompts_behind_much_padding():
    """All tokens fit into one segment, their columns do not."""
    model = writer()
    prompts = [random_ids(1, length, seed=length) for length in (1, 2)]
    ids, mask = left_padded(prompts, width=3 * S)
    for row, prompt in zip(generate(model, ids, mask=mask), prompts, strict=True):
        assert torch.equal(row, greedy(model, prompt, 2 * S + 1)[0])


def test_generation_goes_on_from_a_cache():
    model, ids = writer(), random_ids(2, 14)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))


def test_generated_text_belongs_to_the_last_document():
    model, ids = writer(), random_ids(2, 10)
    documents = torch.tensor([[0] * 4 + [1] * 6, [0] * 8 + [3] * 2])
    alone = [generate(model, ids[:1, 4:])]  # document 1 begins with its segment: as in a row of its own
    for use_cache in (True, False):
        got = generate(model, ids, document_ids=documents, use_cache=use_cache)
        assert torch.equal(got[:1], alone[0])
        text, docs = ids, documents
        for _ in range(got.shape[1]):
            token = model(text, document_ids=docs).logits[:, -1].argmax(-1, keepdim=True)
            text, docs = torch.cat([text, token], dim=1), torch.cat([docs, docs[:, -1:]], dim=1)
        assert torch.equal(got, text[:, 10:])


def test_generation_without_memory():
    """Nothing before the open segment matters then: the text is that of the segment alone."""
    model, ids = writer(), random_ids(2, 3 * S)
    got = generate(model, ids, use_memory=False, new_tokens=S)
    assert torch.equal(got, generate(model, ids, use_memory=False, use_cache=False, new_tokens=S))
    other = torch.cat([random_ids(2, 2 * S, seed=9), ids[:, 2 * S :]], dim=1)
    assert torch.equal(got, generate(model, other, use_memory=False, new_tokens=S))
    assert not torch.equal(generate(model, ids, new_tokens=S), generate(model, other, new_tokens=S))


def test_one_token_at_a_time_costs_one_token(monkeypatch):
    """What each step computes does not grow with the text."""
    model, widths = writer(), []
    block = model.transformer.forward_block
    monkeypatch.setattr(
        model.transformer, "forward_block", lambda ids, *args: (widths.append(tuple(ids.shape)), block(ids, *args))[1]
    )
    generate(model, random_ids(2, 2 * S), new_tokens=30)
    assert widths == [(2, 2 * S)] + [(2, 1)] * 29


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
def test_assisted_generation_is_refused(options):
    model, ids = writer(), random_ids(1, 3).repeat(1, 4)
    if "assistant_model" in options:
        options = {"assistant_model": writer()}
    with pytest.raises(ValueError, match=r"assisted generation is not supported with stateful models.*InfiniGPTNeo"):
        generate(model, ids, **options)


@pytest.fixture
def quiet(caplog):
    """Nothing may be warned, neither by `warnings` nor by transformers' loggers, which only warn once."""
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        yield
    logger.propagate = propagate
    assert [record.getMessage() for record in caplog.get_records("call")] == []


@pytest.mark.parametrize("use_cache", [True, False])
def test_no_limit_at_max_position_embeddings(quiet, use_cache):
    # A number that no other test uses: transformers warns once of each.
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


def test_mask_may_be_of_all_tokens_since_the_start():
    """The convention of Hugging Face's other models; a mask of the new tokens alone means the same."""
    model, ids = tiny_model(), random_ids(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    cache = model(ids[:, :40], attention_mask=mask[:, :40], use_cache=True).past_key_values
    of_all = model(ids[:, 40:], attention_mask=mask, past_key_values=cache).logits
    assert torch.allclose(of_all, model(ids, attention_mask=mask).logits[:, 40:], atol=1e-5)
