"""The grid of segments: slots, documents and masks, against the rules spelled out in loops."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_ds.model.segments import NO_DOCUMENT, build_grid, build_grid_after_cache

many = settings(deadline=None, max_examples=60, derandomize=True)


@st.composite
def packed_rows(draw):
    """Draw (documents, mask) of a few rows with padding anywhere, and a segment length."""
    T, S = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    rows = draw(st.integers(1, 3))
    documents = [sorted(draw(st.lists(st.integers(0, 4), min_size=T, max_size=T))) for _ in range(rows)]
    mask = [draw(st.lists(st.integers(0, 1), min_size=T, max_size=T)) for _ in range(rows)]
    return torch.tensor(documents), torch.tensor(mask), S


@given(packed_rows())
@many
def test_grid_follows_the_rules_of_packing(case):
    documents, mask, S = case
    B, T = documents.shape
    grid = build_grid(documents, S, mask, documents)
    for b in range(B):
        tokens = [int(documents[b, t]) for t in range(T) if mask[b, t]]
        in_memory = NO_DOCUMENT
        for s in range(grid.N):
            segment = tokens[s * grid.S : (s + 1) * grid.S]
            slots = segment + [NO_DOCUMENT] * (grid.S - len(segment))
            assert grid.documents[b, s].tolist() == slots
            assert grid.memory_document[b, s] == in_memory
            assert grid.read_mask[b, s].tolist() == [d == in_memory != NO_DOCUMENT for d in slots]
            in_memory = segment[-1] if segment else in_memory
            assert grid.write_mask[b, s].tolist() == [d == in_memory and i < len(segment) for i, d in enumerate(slots)]
        assert grid.memory_document[b, -1] == in_memory
    # Values that go into slots come back from them, and padding gets 0.
    numbers = torch.arange(1, B * T + 1).view(B, T)
    assert torch.equal(grid.from_slots(grid.to_slots(numbers, 0), T), numbers * mask)


@given(packed_rows(), st.integers(0, 20))
@many
def test_grid_continues_after_a_cache(case, cut):
    """Tokens in two pieces read and write what they read and write in one."""
    documents, mask, S = case
    B, T = documents.shape
    cut = min(cut, T)
    none, nothing = torch.full((B, S), NO_DOCUMENT), torch.full((B,), NO_DOCUMENT)
    first, open_1 = build_grid_after_cache(none, nothing, mask[:, :cut], documents[:, :cut])
    rows = torch.arange(B)
    open_documents = torch.cat([first.documents, none[:, None]], dim=1)[rows, open_1]
    second, open_2 = build_grid_after_cache(
        open_documents, first.memory_document[:, -1], mask[:, cut:], documents[:, cut:]
    )
    complete, open_complete = build_grid_after_cache(none, nothing, mask, documents)
    assert torch.equal(open_1 + open_2, open_complete)
    assert torch.equal(second.memory_document[:, -1], complete.memory_document[:, -1])
    for b in range(B):
        n = int(open_2[b])
        closed = torch.cat([first.documents[b, : open_1[b]], second.documents[b, :n]])
        assert torch.equal(closed, complete.documents[b, : open_complete[b]])
        written = torch.cat([first.write_mask[b, : open_1[b]], second.write_mask[b, :n]])
        assert torch.equal(written, complete.write_mask[b, : open_complete[b]])
