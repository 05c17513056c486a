"""Decoding: what the general path and a pass without a cache give, in place, and never missed where it is possible."""

import copy
from collections import Counter

import gated_decay  # noqa: F401  the rule "gated_decay"
import pytest
import torch
from hypothesis import given, settings
from reference import TINY, gradients, random_ids, tiny_model, writer
from strategies import RULES, texts_in_pieces
from torch.testing import assert_close

from infini_ds.model import InfiniCache, base_model
from infini_ds.model.decoding import DecodingStep
from infini_ds.model.memory_rule import get_memory_rule

exact = {"rtol": 1e-9, "atol": 1e-11}
many = settings(deadline=None, max_examples=60, derandomize=True)
S = TINY["segment_length"]
KINDS = [
    {"position_embedding": "segment"},
    {"position_embedding": "rotary"},
    {"position_embedding": "segment", "short_conv": 2},
    {"position_embedding": "rotary", "short_conv": 3},
    {"position_embedding": "segment", "embed_conv": 6},
]
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def general_path(monkeypatch):
    """A function that runs another one without decoding steps."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(base_model, "fits", lambda *args: False)
            return function()

    return run


@pytest.fixture
def computed(monkeypatch):
    """The calls of all models: (grid's class, rows, computed tokens of a row) of each block."""
    calls = []
    forward_block = base_model.InfiniGPTNeoModel.forward_block

    def spy(model, embeds, states, grid, *args):
        calls.append((type(grid), *embeds.shape[:2]))
        return forward_block(model, embeds, states, grid, *args)

    monkeypatch.setattr(base_model.InfiniGPTNeoModel, "forward_block", spy)
    return calls


def in_pieces(model, ids, pieces, mask=None, documents=None):
    """Return the logits of all tokens, read in pieces with one cache: the first piece with mask and documents."""
    cache, logits = None, []
    with torch.no_grad():
        for number, piece in enumerate(ids.split(pieces, dim=1)):
            given = {} if number else {"attention_mask": mask, "document_ids": documents}
            out = model(piece, past_key_values=cache, use_cache=True, **given)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


TEXTS = {
    "alike": (None, None),
    "padded": (torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]), None),
    "packed": (None, torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0], [3, 3, 3, 3, 3, 4]])),
    "padded and packed": (
        torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]),
        torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1], [3, 3, 3, 3, 3, 3]]),
    ),
}


@pytest.mark.parametrize("pieces", [[6] + [1] * 14, [6, 2, 1, 1, 2, 2, 2, 1, 3]], ids=["single", "several"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("fields", KINDS, ids=lambda fields: "-".join(map(str, fields.values())))
@pytest.mark.parametrize("rule", ["linear", "delta", "gated_decay"])
def test_decoding_equals_the_general_path_and_a_pass_without_cache(rule, fields, text, pieces, general_path, computed):
    """At all positions, across segment ends, in a global layer and in one whose window is shorter than a segment."""
    model = tiny_model(memory_rule=rule, **fields)
    ids, (mask, documents) = random_ids(3, sum(pieces)), TEXTS[text]
    logits, cache = in_pieces(model, ids, pieces, mask, documents)
    steps = Counter(kind is DecodingStep for kind, *_ in computed)
    assert steps[True] >= (len(pieces) - 1 if max(pieces[1:]) == 1 else 3)
    slow, slow_cache = general_path(lambda: in_pieces(model, ids, pieces, mask, documents))
    assert Counter(kind is DecodingStep for kind, *_ in computed)[True] == steps[True]
    valid = torch.ones_like(ids).bool()
    if mask is not None:
        valid[:, :6] = mask.bool()
    assert_close(logits[valid], slow[valid], **exact)
    more = torch.full((3, sum(pieces) - 6), -1)
    all_mask = None if mask is None else torch.cat([mask, torch.ones_like(more)], dim=1)
    all_documents = None if documents is None else torch.cat([documents, documents[:, -1:].expand_as(more)], dim=1)
    with torch.no_grad():
        assert_close(logits[valid], model(ids, all_mask, all_documents).logits[valid], **exact)
    for layer, slow_layer in zip(cache.layer_caches, slow_cache.layer_caches, strict=True):
        assert_close(layer.memory, slow_layer.memory, **exact)
    assert torch.equal(cache.open_documents != -1, slow_cache.open_documents != -1)
    assert torch.equal(cache.memory_document, slow_cache.memory_document)
    assert cache.columns == slow_cache.columns and torch.equal(cache.ids_hash, slow_cache.ids_hash)


@given(texts_in_pieces((*RULES, "gated_decay")))
@many
def test_steps_between_pieces_of_the_general_path(text):
    """Pieces of any length with padding in some, and the count of tokens stays right."""
    model, ids, mask, _, pieces = text
    mask[:, pieces[-1]] = 1
    cache = None
    with torch.no_grad():
        want = model(ids, mask).logits
        for piece in pieces:
            out = model(ids[:, piece], mask[:, piece], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            valid = mask[:, piece].bool()
            assert_close(out.logits[valid], want[:, piece][valid], **exact)
            filled = [count % cache.segment_length for count in cache.tokens()]
            assert filled == (cache.open_documents != -1).sum(1).tolist()


@pytest.mark.parametrize("use_memory", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_arguments_of_a_step(use_memory, labels, general_path, computed):
    """Losses, hidden states, embeddings, and the memory switched off, as in the general path."""
    model, ids = tiny_model(num_layers=2), random_ids(2, 11)

    def step():
        cache = model(ids[:, :9], use_cache=True).past_key_values
        options = {"labels": ids[:, 9:], "loss_reduction": "sum"} if labels else {}
        embeds = model.transformer.wte(ids[:, 9:])
        return model(
            past_key_values=cache, inputs_embeds=embeds, use_memory=use_memory, output_hidden_states=True, **options
        )

    with torch.no_grad():
        fast, slow = step(), general_path(step)
    assert computed[1][0] is DecodingStep and computed[3][0] is not DecodingStep
    assert_close(fast.logits, slow.logits, **exact)
    assert_close(fast.hidden_states, slow.hidden_states, **exact)
    assert (fast.loss is None) == (not labels)
    if labels:
        assert_close(fast.loss, slow.loss, **exact)
    assert fast.past_key_values.ids_hash is None


def prompts(kind):
    """(ids, arguments) of a prompt of 6 columns."""
    mask, documents = TEXTS[kind]
    arguments = {"attention_mask": torch.ones(3, 6, dtype=torch.long) if mask is None else mask}
    return random_ids(3, 6), arguments | ({} if documents is None else {"document_ids": documents})


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}, {"use_memory": False}], ids=str
)
@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("fields", KINDS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_generation_decodes_every_token_after_the_prompt(fields, kind, options, computed, general_path):
    """One token a row and step, across segment ends, and the text is that of the general path."""
    model, (ids, arguments) = writer(**fields), prompts(kind)
    options = OPTIONS | arguments | options

    def generate():
        torch.manual_seed(0)
        return model.generate(ids, max_new_tokens=3 * S, **options)

    text = generate()
    rows = len(ids) * options.get("num_beams", 1) * options.get("num_return_sequences", 1)
    assert computed[1:] == [(DecodingStep, rows, 1)] * (3 * S - 1)
    assert torch.equal(text, general_path(generate))


def test_a_short_prompt_is_decoded_too(computed):
    """It computes its tokens, and not all slots of a segment."""
    model = writer(segment_length=16)
    ids = random_ids(2, 7)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, **OPTIONS)
    assert computed == [(DecodingStep, 2, 7), (DecodingStep, 2, 1), (DecodingStep, 2, 1)]


def test_memory_is_written_at_a_segments_end_alone(monkeypatch):
    """Of the rows that have ended, and no others."""
    written = []
    rule = type(get_memory_rule("linear"))
    write = rule.write
    monkeypatch.setattr(
        rule, "write", lambda self, state, k, *args: (written.append(len(k)), write(self, state, k, *args))[1]
    )
    model, mask = writer(num_layers=2), TEXTS["padded"][0]
    ids = random_ids(3, 6)
    with torch.no_grad():
        cache = model(ids, mask, use_cache=True).past_key_values
        counts = []
        for token in random_ids(3, 8).split(1, dim=1):
            written.clear()
            model(token, past_key_values=cache)
            counts.append(list(written))
    # Rows of 6, 3 and 1 tokens, segments of 4: that of the second row is full after a step, then that of the first.
    assert counts == [[1, 1], [1, 1], [1, 1], [], [1, 1], [1, 1], [1, 1], []]


def test_what_is_not_decoded_takes_the_general_path(computed):
    """Gradients, another row's memory, padding, documents, more tokens than fit, and layers that are compiled."""
    model, ids = tiny_model(), random_ids(2, 11)

    def kind(tokens=1, grad=False, **options):
        computed.clear()
        with torch.no_grad():
            cache = model(ids[:, :9], use_cache=True).past_key_values
        with torch.set_grad_enabled(grad):
            out = model(ids[:, 9 : 9 + tokens], past_key_values=cache, **options)
        return computed[1][0] is DecodingStep, out.logits

    with torch.no_grad():
        want = model(ids).logits[:, 9:]
    decoded, logits = kind()
    assert decoded
    assert_close(logits, want[:, :1], **exact)
    decoded, logits = kind(grad=True)
    assert not decoded and logits.requires_grad
    assert_close(logits, want[:, :1], **exact)
    assert not kind(tokens=2, attention_mask=torch.tensor([[1, 1], [1, 0]]))[0]
    assert kind(tokens=2, attention_mask=torch.tensor([[1, 1], [1, 1]]))[0]
    assert not kind(memory_of=torch.tensor([1, 0]))[0]
    assert not kind(document_ids=torch.tensor([[0], [1]]))[0]
    model.compile_layers()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            assert not kind()[0]
    finally:
        for layer in model.transformer.h:
            layer._compiled_call_impl = None


def continued(model, cache, tokens):
    """Return the logits of tokens (B, T) after a cache, read one by one."""
    return torch.cat([model(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)], dim=1)


@pytest.mark.parametrize("fields", KINDS, ids=lambda fields: "-".join(map(str, fields.values())))
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("copying", [copy.deepcopy, InfiniCache.copy], ids=["deepcopy", "copy"])
def test_a_copy_of_a_cache_is_independent(copying, before, fields):
    """Copied before and after decoding steps, it continues in two ways."""
    model, ids = tiny_model(**fields), random_ids(2, 7 + before)
    one, other = random_ids(2, 6, seed=1), random_ids(2, 6, seed=2)
    with torch.no_grad():
        cache = model(ids[:, :7], use_cache=True).past_key_values
        if before:
            continued(model, cache, ids[:, 7:])
        branch = copying(cache)
        first = torch.cat([continued(model, cache, one[:, :3]), continued(model, cache, one[:, 3:])], dim=1)
        assert_close(
            continued(model, branch, other), model(torch.cat([ids, other], 1)).logits[:, 7 + before :], **exact
        )
        assert_close(first, model(torch.cat([ids, one], dim=1)).logits[:, 7 + before :], **exact)


def test_layers_of_a_new_cache_do_not_share_their_keys():
    model, ids = tiny_model(num_layers=2), random_ids(2, 3)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    addresses = {x.data_ptr() for layer in cache.layer_caches for x in (layer.k, layer.v)}
    assert len(addresses) == 4


@pytest.mark.parametrize("modes", [("inference", "no_grad"), ("no_grad", "inference"), ("grad", "inference")], ids=str)
def test_a_cache_passes_between_modes(modes):
    model, ids = tiny_model(), random_ids(2, 20)
    contexts = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
    cache, logits = None, []
    for number, piece in enumerate(ids.split([7, *[1] * 13], dim=1)):
        with contexts[modes[number % 2]]():
            out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits.detach())
    with torch.no_grad():
        assert_close(torch.cat(logits, dim=1), model(ids).logits, **exact)


def test_decoding_leaves_autograds_tensors_alone():
    """Steps without gradients between those with them, before the backward pass: gradients stay what they are."""
    model, ids = tiny_model(), random_ids(2, 12)
    want = gradients(model(ids[:, :6]).logits.square().sum(), model)

    out = model(ids[:, :5], use_cache=True)
    last = model(ids[:, 5:6], past_key_values=out.past_key_values)
    with torch.no_grad():
        continued(model, last.past_key_values, ids[:, 6:])
    got = gradients(out.logits.square().sum() + last.logits.square().sum(), model)
    for name, gradient in want.items():
        assert_close(got[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("fields", KINDS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_rows_are_chosen_between_steps(fields):
    """As beams do, at every step and with rows of different lengths."""
    model, (ids, arguments) = tiny_model(**fields), prompts("padded")
    index = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = model(ids, **arguments, use_cache=True).past_key_values
        mask = arguments["attention_mask"]
        for token in random_ids(3, 9, seed=3).split(1, dim=1):
            got = model(token, past_key_values=cache).logits
            ids, mask = torch.cat([ids, token], dim=1), torch.cat([mask, torch.ones_like(token)], dim=1)
            assert_close(got, model(ids, mask).logits[:, -1:], **exact)
            cache.select_rows(index)
            ids, mask = ids[index], mask[index]


def test_bf16_decodes_as_the_general_path(general_path):
    model, ids = tiny_model(dtype=torch.bfloat16, position_embedding="rotary", short_conv=2), random_ids(2, 20)
    fast, _ = in_pieces(model, ids, [7, *[1] * 13])
    slow, _ = general_path(lambda: in_pieces(model, ids, [7, *[1] * 13]))
    assert_close(fast, slow, rtol=0.02, atol=0.05)
    assert fast.dtype == torch.bfloat16
