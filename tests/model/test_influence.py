"""Which tokens influence which: causality, rows, documents, windows, and the memory of another row."""

import pytest
import torch
from hypothesis import given, settings
from reference import TINY, random_ids, tiny_model
from strategies import batches
from torch.testing import assert_close

from infini_ds.model import InfiniGPTNeoForCausalLM

few = settings(deadline=None, max_examples=25, derandomize=True)
exact = {"rtol": 1e-9, "atol": 1e-11}


def influence(model: InfiniGPTNeoForCausalLM, ids: torch.Tensor, at: int, **inputs) -> torch.Tensor:
    """Return bool (T,): the positions where another token at `at` changes any bit of the logits."""
    other = ids.clone()
    other[:, at] = ids[:, at] % (TINY["vocab_size"] - 1) + 1
    with torch.no_grad():
        return (model(ids, **inputs).logits != model(other, **inputs).logits).any(-1).any(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("segments_per_block", [None, 2])
@pytest.mark.parametrize("documents", [False, True])
def test_no_token_changes_the_past(dtype, segments_per_block, documents):
    model = tiny_model(dtype=dtype, segments_per_block=segments_per_block)
    ids = random_ids(1, 21)
    inputs = {"document_ids": torch.zeros_like(ids)} if documents else {}
    for at in range(21):
        changed = influence(model, ids, at, **inputs)
        assert not changed[:at].any()
        assert changed[at]


@pytest.mark.parametrize("segments_per_block", [None, 1, 3])
def test_no_token_changes_another_document(segments_per_block):
    model = tiny_model(dtype=torch.float32, segments_per_block=segments_per_block)
    documents = torch.tensor([[0] * 6 + [1] * 1 + [2] * 9 + [5] * 8 + [6] * 3])
    ids = random_ids(1, documents.shape[1])
    for at in range(documents.shape[1]):
        changed = influence(model, ids, at, document_ids=documents)
        assert not changed[documents[0] != documents[0, at]].any()
        assert changed[at]


def test_no_row_changes_another():
    model, ids = tiny_model(dtype=torch.float32), random_ids(3, 14)
    other = ids.clone()
    other[1] = other[1].flip(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits[[0, 2]], model(other).logits[[0, 2]])


def test_a_document_gives_the_same_wherever_it_is_packed():
    """A packed document that starts on a segment boundary computes what it computes in a row of its own."""
    model, S = tiny_model(), TINY["segment_length"]
    first, second = random_ids(1, 3 * S, seed=1), random_ids(1, 2 * S + 3, seed=2)
    documents = torch.tensor([[4] * first.shape[1] + [7] * second.shape[1]])
    with torch.no_grad():
        packed = model(torch.cat([first, second], dim=1), document_ids=documents).logits
        assert_close(packed[:, : 3 * S], model(first).logits, **exact)
        assert_close(packed[:, 3 * S :], model(second).logits, **exact)


def test_the_memory_reaches_across_segments_and_local_attention_does_not():
    model, ids, S = tiny_model(), random_ids(1, 80), TINY["segment_length"]
    changed = influence(model, ids, 1)
    assert changed[S:].all()
    without = influence(model, ids, 1, use_memory=False)
    assert without[1:S].any() and not without[S:].any()


@pytest.mark.parametrize("segments_per_block", [None, 1, 3])
@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("lengths", [(23, 23), (23, 9), (9, 23)])
def test_memory_of_equals_each_segment_after_the_other_rows_cache(lengths, rule, segments_per_block):
    """Each segment s of one row in a call of its own, after a cache of the other row's first s segments."""
    model = tiny_model(1, segment_length=4, memory_rule=rule, segments_per_block=segments_per_block)
    (T, U), S = lengths, 4
    one, other = random_ids(1, T, 1), random_ids(1, U, 2)
    with torch.no_grad():
        expected = []
        for start in range(0, T, S):
            before = other[:, :start]
            cache = model(before, use_cache=True).past_key_values if start else None
            if cache is not None:  # close the segment in which the other row has ended
                for state, closed in zip(cache.layer_caches, model(before).memory, strict=True):
                    state.memory = closed
                cache.memory_document = torch.zeros(1, dtype=torch.long)
                cache.open_documents = torch.full((1, S), -1)
            expected.append(model(one[:, start : start + S], past_key_values=cache).logits)
        ids = torch.zeros(2, max(lengths), dtype=torch.long)
        ids[0, :T], ids[1, :U] = one, other
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        out = model(ids, mask.long(), memory_of=torch.tensor([1, 1]))
        alone = model(other).logits
    assert_close(out.logits[:1, :T], torch.cat(expected, dim=1), **exact)
    assert_close(out.logits[1:, :U], alone, **exact)
    if T == U:
        assert_close(model(ids, memory_of=torch.tensor([1, 1])).logits, out.logits, **exact)
    assert not torch.allclose(out.logits[0, S:T], model(one).logits[0, S:])


@given(batches())
@few
def test_memory_of_the_row_itself_changes_nothing(batch):
    model, ids, mask, documents = batch
    with torch.no_grad():
        plain = model(ids, mask, documents)
        own = model(ids, mask, documents, memory_of=torch.arange(len(ids)))
    assert torch.equal(own.logits, plain.logits)


def test_memory_of_an_empty_row_reads_nothing():
    model = tiny_model(2, segment_length=4)
    ids = random_ids(2, 12, 3)
    mask = torch.tensor([[1] * 12, [0] * 12])
    with torch.no_grad():
        out = model(ids, mask, memory_of=torch.tensor([1, 1])).logits[0]
        off = model(ids[:1], use_memory=False).logits[0]
    assert_close(out, off, **exact)


def test_a_layers_window_ends_inside_its_segment():
    fields = {"num_layers": 1, "attention_types": [[["local"], 1]], "window_size": 3, "segment_length": 8}
    changed = influence(tiny_model(**fields), random_ids(1, 8), 2)
    assert changed.tolist() == [False, False, True, True, True, False, False, False]
