"""The memory's and the grid's functions alone, against loops."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from infini_ds.model import loss, memory
from infini_ds.model.local_attention import local_attention, rotary_angles, rotate
from infini_ds.model.loss import IGNORE_INDEX, summed_loss, token_losses
from infini_ds.model.memory import (
    MemoryState,
    blend,
    feature_map,
    memory_dtype,
    prefix_sums,
    retrieve,
    segment_updates,
)
from infini_ds.model.memory_rule import RULES
from infini_ds.model.segments import NO_DOCUMENT, build_grid, build_grid_after_cache

many = settings(deadline=None, max_examples=60, derandomize=True)


def random(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_feature_map_is_elu_plus_one(dtype):
    x = torch.linspace(-12, 12, 1001, dtype=dtype)
    assert_close(feature_map(x), torch.nn.functional.elu(x) + 1, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-15)


def test_feature_map_keeps_its_precision_and_is_never_zero():
    x = torch.linspace(-30, 0, 301)
    assert_close(feature_map(x), x.double().exp().float())  # relative, where ELU(x) + 1 in fp32 is 0 below -17
    for extreme in (-1e4, -float("inf")):
        tiniest = feature_map(torch.full((4,), extreme))
        assert (tiniest > 0).all() and (tiniest * tiniest > torch.finfo(torch.float32).tiny).all()
    for dtype in (torch.bfloat16, torch.float16):
        assert feature_map(torch.ones(2, dtype=dtype)).dtype == torch.float32


def test_feature_map_gradient_is_continuous_at_zero():
    x = torch.tensor([-1e-9, -0.0, 0.0, 1e-9], requires_grad=True)
    feature_map(x).sum().backward()
    assert_close(x.grad, torch.ones(4))


def empty(H: int, D: int, dtype=torch.float64) -> MemoryState:
    """The memory of one row to which nothing has been written."""
    return RULES["linear"].empty_state(1, H, D, memory_dtype(dtype), "cpu")


def accumulate(start: MemoryState, updates: MemoryState, memory_document=None) -> tuple[MemoryState, MemoryState]:
    """Prefix sums of M and z."""
    sums = (prefix_sums(*pair, memory_document) for pair in zip(start, updates, strict=True))
    return tuple(MemoryState(*states) for states in zip(*sums, strict=True))


def all_states(before: MemoryState, after: MemoryState) -> MemoryState:
    """The memory before each segment and after the last, along one dimension of N + 1."""
    return MemoryState(*(torch.cat([x, y[:, None]], dim=1) for x, y in zip(before, after, strict=True)))


@pytest.mark.parametrize(
    "held", [None, [0, 0, 0, 0, 0], [NO_DOCUMENT, 0, 0, 2, 2], [3, 3, 5, 6, 6], [NO_DOCUMENT, NO_DOCUMENT, 0, 0, 1]]
)
@pytest.mark.parametrize("together", [1, 2, 3, 16])
def test_prefix_sums_are_the_recurrence(held, together, monkeypatch):
    """The linear rule one segment after the other, emptied where the document changes."""
    monkeypatch.setattr(memory, "PREFIX_CHUNK", together)
    torch.manual_seed(0)
    B, N, H, S, D = 2, 4, 3, 5, 4
    k, v = random(B, N, H, S, D).requires_grad_(), random(B, N, H, S, D).requires_grad_()
    start = MemoryState(random(B, H, D, D).requires_grad_(), random(B, H, D).abs().requires_grad_())
    write = torch.rand(B, N, S) > 0.3

    M, z, states = start.M, start.z, [start]
    for s in range(N):
        phi_k = feature_map(k[:, s]) * write[:, s, None, :, None]
        if held is not None and held[s + 1] != held[s]:
            M, z = torch.zeros_like(M), torch.zeros_like(z)
        M = M + torch.einsum("bhsd,bhse->bhde", phi_k, v[:, s])
        z = z + phi_k.sum(2)
        states.append(MemoryState(M, z))
    want = MemoryState(*(torch.stack(x, dim=1) for x in zip(*states, strict=True)))

    document_held = None if held is None else torch.tensor([held] * B)
    got = all_states(*RULES["linear"].write(start, k, v, write, document_held, {}))
    weight = [torch.randn_like(x) for x in want]
    inputs = (k, v, start.M, start.z)
    assert_close(tuple(got), tuple(want))
    totals = [sum((w * x).sum() for w, x in zip(weight, result, strict=True)) for result in (got, want)]
    assert_close(*(torch.autograd.grad(total, inputs) for total in totals))


def test_prefix_sums_keep_documents_apart_to_the_last_bit():
    torch.manual_seed(0)
    segments = MemoryState(random(1, 6, 2, 4, 4), random(1, 6, 2, 4))
    start = MemoryState(random(1, 2, 4, 4), random(1, 2, 4))
    held = torch.tensor([[0, 0, 1, 1, 1, 2, 2]])
    before = all_states(*accumulate(start, segments, held))
    changed = MemoryState(*(x.clone() for x in segments))
    for x in changed:
        x[:, :1] *= 1e6  # document 0
        x[:, 4:] *= 1e6  # document 2
    after = all_states(*accumulate(MemoryState(*(1e6 * x for x in start)), changed, held))
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, 2:5], y[:, 2:5])


RAGGED = [[1, 128, 128], [8, 128, 128], [128, 128, 128], [128, 3, 128], [1, 1, 128]]


@pytest.mark.parametrize("lengths", RAGGED)
def test_the_delta_rule_never_amplifies(lengths):
    """A memory that nothing is added to (v = 0) does not grow, whatever the lengths of the segments before."""
    norms = delta_norms(lengths, "delta")
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(norms[1:]))


def test_the_papers_delta_rule_blows_up_after_a_short_segment():
    """What the bounded form is for: one token first, then segments of 128."""
    _, first, second, _ = delta_norms([1, 128, 128], "delta_paper")
    assert second > 100 * first
    _, first, second, _ = delta_norms([128, 128, 128], "delta_paper")
    assert second < first


def delta_norms(lengths: list[int], rule: str) -> list[float]:
    """Norms of M before each of three segments and after the last; only the first one has values to write."""
    torch.manual_seed(0)
    k, v = random(1, len(lengths), 2, 128, 64), random(1, len(lengths), 2, 128, 64)
    v[:, 1:] = 0
    write = torch.arange(128) < torch.tensor(lengths)[None, :, None]
    return all_states(*RULES[rule].write(empty(2, 64), k, v, write, None, {})).M.flatten(2).norm(dim=-1)[0].tolist()


@pytest.mark.parametrize("rule", ["delta", "delta_paper"])
def test_the_delta_rule_replaces_what_a_key_returned(rule):
    """With one key alone in the memory, writing another value for it gives that value back (paper, section 2.2.2)."""
    k, v = random(1, 3, 1, 1, 8), random(1, 3, 1, 1, 8)
    k[:] = k[:, :1]
    states = all_states(*RULES[rule].write(empty(1, 8), k, v, None, None, {}))
    phi = feature_map(k[0, 0, 0, 0])
    value = phi @ states.M[0, :, 0] / (phi @ phi)  # what M holds for the key: (N + 1, D)
    if rule == "delta_paper":  # after the second write the first value is gone
        torch.testing.assert_close(value[2], v[0, 1, 0, 0])
    else:  # z counts two writes, so half of the first is taken off
        torch.testing.assert_close(value[2], v[0, 1, 0, 0] + v[0, 0, 0, 0] / 2)


def test_retrieve_is_a_weighted_average():
    """Every token that reads gets an average of the values written, whose shares are phi(q) phi(k)."""
    torch.manual_seed(0)
    q, k, v = random(1, 1, 2, 3, 4), random(1, 1, 2, 7, 4), random(1, 1, 2, 7, 4)
    shares = feature_map(q) @ feature_map(k).transpose(-1, -2)
    assert_close(retrieve(q, segment_updates(feature_map(k), v)), shares / shares.sum(-1, keepdim=True) @ v)


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0, 1000.0])
def test_retrieve_and_its_gradient_survive_large_activations(scale):
    """phi(q) or phi(k) may underflow in every place: the result stays an average, the gradient stays that of fp64."""
    torch.manual_seed(0)
    q, k, v = (random(2, 3, 2, 8, 4, dtype=torch.float32) for _ in range(3))
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [(scale * x).to(dtype).requires_grad_() for x in (q, k)] + [v.to(dtype).requires_grad_()]
        out = retrieve(inputs[0], segment_updates(feature_map(inputs[1]), inputs[2]))
        assert out.abs().max() <= v.abs().max() + 1e-5
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for single, double in zip(*results, strict=True):
        assert_close(single.double(), double, rtol=1e-3, atol=1e-3 * double.detach().abs().max().item())


def test_empty_memory_gives_zero_and_no_nan():
    q = random(1, 2, 2, 3, 4, dtype=torch.float32).requires_grad_()
    nothing = MemoryState(*(x.expand(1, 2, *x.shape[1:]) for x in empty(2, 4, torch.float32)))
    out = retrieve(q, nothing)
    assert torch.equal(out, torch.zeros_like(out))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_blend_gates_each_head_and_leaves_those_who_read_nothing():
    torch.manual_seed(0)
    local, retrieved, beta = random(2, 3, 2, 4, 5), random(2, 3, 2, 4, 5), torch.tensor([-1.0, 2.0])
    read = torch.rand(2, 3, 4) > 0.5
    got = blend(local, retrieved, beta, read)
    for b, n, h, s in [(b, n, h, s) for b in range(2) for n in range(3) for h in range(2) for s in range(4)]:
        g = 1 / (1 + torch.exp(-beta[h].double())) if read[b, n, s] else torch.tensor(0.0)
        assert_close(got[b, n, h, s], g * retrieved[b, n, h, s] + (1 - g) * local[b, n, h, s])
    assert torch.equal(got.transpose(2, 3)[~read], local.transpose(2, 3)[~read])


def test_memory_is_never_kept_in_low_precision():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        k = torch.randn(1, 2, 1, 3, 4).to(dtype)
        before, after = accumulate(empty(1, 4, dtype), segment_updates(feature_map(k), k))
        assert {x.dtype for x in (*before, *after)} == {torch.float32}
        assert blend(k, retrieve(k, before), torch.zeros(1), k[..., 0, :, 0] > 9).dtype == dtype


def test_z_counts_exactly_over_a_thousand_segments():
    """In bf16 a sum stops at 256 times its terms."""
    k = torch.zeros(1, 1024, 1, 1, 2, dtype=torch.bfloat16)
    state = all_states(*accumulate(empty(1, 2, torch.bfloat16), segment_updates(feature_map(k), k)))
    assert torch.equal(state.z[0, :, 0, 0], torch.arange(1025.0))


def test_local_attention_does_not_scale():
    torch.manual_seed(0)
    q, k, v = (random(1, 1, 3, 16) for _ in range(3))
    scores = (q @ k.transpose(-1, -2)).masked_fill(~torch.ones(3, 3).tril().bool(), -torch.inf)
    assert_close(local_attention(q, k, v, None), scores.softmax(-1) @ v)


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = random(8), random(8)

    def score(i: int, j: int) -> torch.Tensor:
        at = rotary_angles(torch.tensor([i, j]), 8, 10000.0)
        return rotate(q, at[0][0], at[1][0]) @ rotate(k, at[0][1], at[1][1])

    assert_close(score(7, 3), score(19, 15), rtol=0, atol=1e-5)
    assert_close(score(5, 5), q @ k, rtol=0, atol=1e-6)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-2


@st.composite
def packed_rows(draw):
    """(documents, mask) of a few rows with padding anywhere, and a segment length."""
    T, S = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    rows = draw(st.integers(1, 3))
    documents = [sorted(draw(st.lists(st.integers(0, 4), min_size=T, max_size=T))) for _ in range(rows)]
    mask = [draw(st.lists(st.integers(0, 1), min_size=T, max_size=T)) for _ in range(rows)]
    return torch.tensor(documents), torch.tensor(mask), S


@given(packed_rows())
@many
def test_grid_follows_the_rules_of_packed_documents(case):
    documents, mask, S = case
    B, T = documents.shape
    grid = build_grid(documents, S, mask, documents)
    for b in range(B):
        tokens = [int(documents[b, t]) for t in range(T) if mask[b, t]]
        held = NO_DOCUMENT
        for s in range(grid.N):
            segment = tokens[s * grid.S : (s + 1) * grid.S]
            slots = segment + [NO_DOCUMENT] * (grid.S - len(segment))
            assert grid.documents[b, s].tolist() == slots
            assert grid.memory_document[b, s] == held
            assert grid.read_mask[b, s].tolist() == [d == held != NO_DOCUMENT for d in slots]
            held = segment[-1] if segment else held
            assert grid.write_mask[b, s].tolist() == [d == held and i < len(segment) for i, d in enumerate(slots)]
        assert grid.memory_document[b, -1] == held
    # What goes onto the grid comes back, and padding gets nothing.
    numbers = torch.arange(1, B * T + 1).view(B, T)
    assert torch.equal(grid.from_slots(grid.to_slots(numbers, 0), T), numbers * mask)


@given(packed_rows(), st.integers(0, 20))
@many
def test_grid_goes_on_where_a_cache_ended(case, cut):
    """Tokens in two pieces read and write what they do in one."""
    documents, mask, S = case
    B, T = documents.shape
    cut = min(cut, T)
    none, nothing = torch.full((B, S), NO_DOCUMENT), torch.full((B,), NO_DOCUMENT)
    first, open_1 = build_grid_after_cache(none, nothing, mask[:, :cut], documents[:, :cut])
    rows = torch.arange(B)
    held_documents = torch.cat([first.documents, none[:, None]], dim=1)[rows, open_1]
    second, open_2 = build_grid_after_cache(
        held_documents, first.memory_document[:, -1], mask[:, cut:], documents[:, cut:]
    )
    whole, open_whole = build_grid_after_cache(none, nothing, mask, documents)
    assert torch.equal(open_1 + open_2, open_whole)
    assert torch.equal(second.memory_document[:, -1], whole.memory_document[:, -1])
    for b in range(B):
        n = int(open_2[b])
        closed = torch.cat([first.documents[b, : open_1[b]], second.documents[b, :n]])
        assert torch.equal(closed, whole.documents[b, : open_whole[b]])
        written = torch.cat([first.write_mask[b, : open_1[b]], second.write_mask[b, :n]])
        assert torch.equal(written, whole.write_mask[b, : open_whole[b]])


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 39])
def test_losses_equal_cross_entropy_at_every_chunk(rows, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "MAX_CHUNK_LOGITS", 16 * 7)
    hidden, weight = random(rows, 3).requires_grad_(), random(7, 3).requires_grad_()
    targets = torch.randint(0, 7, (rows,))
    targets[::3] = IGNORE_INDEX
    want = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none", ignore_index=IGNORE_INDEX)
    want_grads = torch.autograd.grad(want.sum(), (hidden, weight))
    assert_close(token_losses(hidden, weight, targets), want)
    for total in (token_losses(hidden, weight, targets).sum(), summed_loss(hidden, weight, targets)):
        assert_close(total, want.sum())
        assert_close(torch.autograd.grad(total, (hidden, weight)), want_grads)
    with torch.no_grad():
        assert_close(token_losses(hidden, weight, targets), want)


def test_losses_of_targets_whose_probability_underflows():
    torch.manual_seed(0)
    hidden, weight, targets = 60 * torch.randn(20, 4), torch.randn(50, 4), torch.randint(0, 50, (20,))
    want = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    assert want > 20 * 104  # in fp32 exp(-104) is 0
    assert_close(summed_loss(hidden.requires_grad_(), weight, targets), want.float())


def test_summed_loss_does_not_sum_in_bf16():
    torch.manual_seed(0)
    hidden, weight = torch.randn(900, 4).bfloat16(), torch.randn(50, 4).bfloat16()
    targets = torch.randint(0, 50, (900,))
    want = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    got = summed_loss(hidden, weight, targets)
    assert got.dtype == torch.float32
    assert_close(got.double(), want, rtol=1e-3, atol=0)
