"""Hypothesis strategies: batches with documents and padding anywhere, and tiny models of every kind for them."""

from itertools import pairwise

import torch
from hypothesis import strategies as st
from reference import random_ids, tiny_model

RULES = ("linear", "softmax", "delta", "delta_paper", "gated_delta")


@st.composite
def batches(draw, max_segments: int = 4, rules: tuple[str, ...] = RULES):
    """(model, ids, mask, documents): lengths around segment ends, documents, padding anywhere, every kind of layer."""
    S = draw(st.integers(1, 6))
    T = max(1, draw(st.integers(0, max_segments)) * S + draw(st.sampled_from([-1, 0, 1, 2])))
    B, seed = draw(st.integers(1, 2)), draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    mask = documents = None
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.0, 0.2, 0.8]))
        mask = (torch.rand(B, T, generator=generator) >= share).long()
    if draw(st.booleans()):
        change = draw(st.sampled_from([0.05, 0.3, 1.0]))
        documents = (torch.rand(B, T, generator=generator) < change).long().cumsum(1)
    kinds = draw(st.sampled_from([["global"], ["local"], ["global", "local"], ["local", "global", "local"]]))
    model = tiny_model(
        seed,
        segment_length=S,
        segments_per_block=draw(st.sampled_from([None, 1, 2, 3])),
        position_embedding=draw(st.sampled_from(["segment", "rotary"])),
        memory_rule=draw(st.sampled_from(rules)),
        window_size=draw(st.integers(1, 7)),
        short_conv=draw(st.sampled_from([0, 2, 3])),
        embed_conv=draw(st.sampled_from([0, 0, 2, 5])),
        num_layers=len(kinds),
        attention_types=[[kinds, 1]],
    )
    return model, random_ids(B, T, seed), mask, documents


@st.composite
def texts_in_pieces(draw, rules: tuple[str, ...] = RULES):
    """(model, ids, mask, documents, pieces): rows cut anywhere, so that a row may have no token in a piece."""
    T, B, seed = draw(st.integers(1, 26)), draw(st.integers(1, 3)), draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    share = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.3, 0.9]), min_size=B, max_size=B)))
    mask = (torch.rand(B, T, generator=generator) >= share[:, None]).long()
    documents = None
    if draw(st.booleans()):
        documents = (torch.rand(B, T, generator=generator) < draw(st.sampled_from([0.1, 0.5]))).long().cumsum(1)
    cuts = sorted([*draw(st.lists(st.integers(1, T), max_size=5, unique=True)), T])
    pieces = [slice(a, b) for a, b in pairwise([0, *cuts]) if a < b]
    model = tiny_model(
        seed,
        segment_length=draw(st.integers(1, 6)),
        segments_per_block=draw(st.sampled_from([None, 1, 2])),
        position_embedding=draw(st.sampled_from(["segment", "rotary"])),
        memory_rule=draw(st.sampled_from(rules)),
        window_size=draw(st.integers(1, 7)),
        short_conv=draw(st.sampled_from([0, 2, 3])),
        embed_conv=draw(st.sampled_from([0, 0, 2, 5])),
    )
    return model, random_ids(B, T, seed), mask, documents, pieces


def logits_in_pieces(model, ids, mask, documents, pieces):
    """Return the logits (B, T, V) of a text that is read piece by piece into a cache, and the cache."""
    cache, logits = None, []
    for piece in pieces:
        some = None if documents is None else documents[:, piece]
        out = model(ids[:, piece], mask[:, piece], some, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache
