"""The memory's functions and the built-in rules, against loops."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from infini_ds.model import InfiniGPTNeoConfig, memory
from infini_ds.model.memory import MemoryState, blend, feature_map, memory_dtype, prefix_sums, retrieve, segment_updates
from infini_ds.model.memory_rule import RULES
from infini_ds.model.segments import NO_DOCUMENT

RAGGED = [[1, 128, 128], [8, 128, 128], [128, 128, 128], [128, 3, 128], [1, 1, 128]]


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
    """Return the memory of one row to which nothing has been written."""
    return RULES["linear"].empty_state(1, H, D, memory_dtype(dtype), "cpu")


def accumulate(start: MemoryState, updates: MemoryState, memory_document=None) -> tuple[MemoryState, MemoryState]:
    """Return the prefix sums of M and z."""
    sums = (prefix_sums(*pair, memory_document) for pair in zip(start, updates, strict=True))
    return tuple(MemoryState(*states) for states in zip(*sums, strict=True))


def all_states(before: MemoryState, after: MemoryState) -> MemoryState:
    """Return the memory before each segment and after the last one, along one dimension of N + 1."""
    return MemoryState(*(torch.cat([x, y[:, None]], dim=1) for x, y in zip(before, after, strict=True)))


@pytest.mark.parametrize(
    "document", [None, [0, 0, 0, 0, 0], [NO_DOCUMENT, 0, 0, 2, 2], [3, 3, 5, 6, 6], [NO_DOCUMENT, NO_DOCUMENT, 0, 0, 1]]
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 16])
def test_prefix_sums_equal_the_recurrence(document, chunk, monkeypatch):
    """The linear rule, one segment after the other, emptied where the document changes."""
    monkeypatch.setattr(memory, "PREFIX_CHUNK", chunk)
    torch.manual_seed(0)
    B, N, H, S, D = 2, 4, 3, 5, 4
    k, v = random(B, N, H, S, D).requires_grad_(), random(B, N, H, S, D).requires_grad_()
    start = MemoryState(random(B, H, D, D).requires_grad_(), random(B, H, D).abs().requires_grad_())
    write = torch.rand(B, N, S) > 0.3

    M, z, states = start.M, start.z, [start]
    for s in range(N):
        phi_k = feature_map(k[:, s]) * write[:, s, None, :, None]
        if document is not None and document[s + 1] != document[s]:
            M, z = torch.zeros_like(M), torch.zeros_like(z)
        M = M + torch.einsum("bhsd,bhse->bhde", phi_k, v[:, s])
        z = z + phi_k.sum(2)
        states.append(MemoryState(M, z))
    want = MemoryState(*(torch.stack(x, dim=1) for x in zip(*states, strict=True)))

    memory_document = None if document is None else torch.tensor([document] * B)
    got = all_states(*RULES["linear"].write(start, k, v, write, memory_document, {}))
    weight = [torch.randn_like(x) for x in want]
    inputs = (k, v, start.M, start.z)
    assert_close(tuple(got), tuple(want))
    totals = [sum((w * x).sum() for w, x in zip(weight, result, strict=True)) for result in (got, want)]
    assert_close(*(torch.autograd.grad(total, inputs) for total in totals))


def test_prefix_sums_keep_documents_apart_to_the_last_bit():
    torch.manual_seed(0)
    segments = MemoryState(random(1, 6, 2, 4, 4), random(1, 6, 2, 4))
    start = MemoryState(random(1, 2, 4, 4), random(1, 2, 4))
    document = torch.tensor([[0, 0, 1, 1, 1, 2, 2]])
    before = all_states(*accumulate(start, segments, document))
    changed = MemoryState(*(x.clone() for x in segments))
    for x in changed:
        x[:, :1] *= 1e6  # document 0
        x[:, 4:] *= 1e6  # document 2
    after = all_states(*accumulate(MemoryState(*(1e6 * x for x in start)), changed, document))
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, 2:5], y[:, 2:5])


def test_softmax_features_keep_a_fact_apart_from_any_amount_of_text():
    """Keys of the text share their largest feature with no fact; what is left of the linear rule's answer is noise."""
    rng = torch.Generator().manual_seed(0)
    D, N, S = 8, 500, 128
    fact = torch.zeros(D)
    fact[0] = 8.0
    k = torch.randn(1, N, 1, S, D, generator=rng)
    k[..., 1] += 12
    v = torch.randn(1, N, 1, S, D, generator=rng)
    k[:, 0, :, 0], v[:, 0, :, 0] = fact, 1.0
    errors = {}
    for name in ("softmax", "linear"):
        rule = RULES[name]
        parameters = dict(rule.parameters(InfiniGPTNeoConfig(num_heads=1)))
        _, after = rule.write(empty(1, D), k, v, None, None, parameters)
        read = rule.read(fact.view(1, 1, 1, 1, D), MemoryState(*(x[:, None] for x in after)), parameters)
        errors[name] = (read - 1).abs().max().item()
    assert errors["softmax"] < 1e-6 and errors["linear"] > 0.9


@pytest.mark.parametrize("extreme", [1e4, 1e20])
def test_softmax_features_of_extreme_keys_are_finite_and_so_are_their_gradients(extreme):
    rule = RULES["softmax"]
    parameters = dict(rule.parameters(InfiniGPTNeoConfig(num_heads=1)))
    k = torch.tensor([extreme, 0.0]).view(1, 1, 1, 1, 2).requires_grad_()
    q = k.detach().flip(-1).requires_grad_()  # no feature in common
    _, after = rule.write(empty(1, 2), k, torch.ones_like(k), None, None, parameters)
    out = rule.read(q, MemoryState(*(x[:, None] for x in after)), parameters)
    out.sum().backward()
    assert_close(out, torch.ones_like(out))
    assert all(x.grad.isfinite().all() for x in (k, q, parameters["log_scale"]))


@pytest.mark.parametrize("lengths", RAGGED)
def test_the_delta_rule_never_amplifies(lengths):
    """A memory to which only zeros are written (v = 0) does not grow, whatever the lengths of earlier segments."""
    norms = delta_norms(lengths, "delta")
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(norms[1:]))


def test_the_papers_delta_rule_blows_up_after_a_short_segment():
    """The reason for the bounded form: one token first, then segments of 128."""
    _, first, second, _ = delta_norms([1, 128, 128], "delta_paper")
    assert second > 100 * first
    _, first, second, _ = delta_norms([128, 128, 128], "delta_paper")
    assert second < first


def delta_norms(lengths: list[int], rule: str) -> list[float]:
    """Return the norms of M before each of three segments and after the last; only the first writes values."""
    torch.manual_seed(0)
    k, v = random(1, len(lengths), 2, 128, 64), random(1, len(lengths), 2, 128, 64)
    v[:, 1:] = 0
    write = torch.arange(128) < torch.tensor(lengths)[None, :, None]
    return all_states(*RULES[rule].write(empty(2, 64), k, v, write, None, {})).M.flatten(2).norm(dim=-1)[0].tolist()


@pytest.mark.parametrize("rule", ["delta", "delta_paper"])
def test_the_delta_rule_replaces_what_a_key_returned(rule):
    """With a single key in the memory, writing another value for it returns that value (paper, section 2.2.2)."""
    k, v = random(1, 3, 1, 1, 8), random(1, 3, 1, 1, 8)
    k[:] = k[:, :1]
    states = all_states(*RULES[rule].write(empty(1, 8), k, v, None, None, {}))
    phi = feature_map(k[0, 0, 0, 0])
    value = phi @ states.M[0, :, 0] / (phi @ phi)  # what M holds for the key: (N + 1, D)
    if rule == "delta_paper":  # after the second write the first value is gone
        torch.testing.assert_close(value[2], v[0, 1, 0, 0])
    else:  # z counts two writes, so half of the first value is subtracted
        torch.testing.assert_close(value[2], v[0, 1, 0, 0] + v[0, 0, 0, 0] / 2)


def test_retrieve_is_a_weighted_average():
    """Each query gets an average of the values written, with weights in proportion to phi(q) phi(k)."""
    torch.manual_seed(0)
    q, k, v = random(1, 1, 2, 3, 4), random(1, 1, 2, 7, 4), random(1, 1, 2, 7, 4)
    weights = feature_map(q) @ feature_map(k).transpose(-1, -2)
    assert_close(
        retrieve(feature_map(q), segment_updates(feature_map(k), v)), weights / weights.sum(-1, keepdim=True) @ v
    )


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0, 1000.0])
def test_retrieve_and_its_gradient_survive_large_activations(scale):
    """phi(q) or phi(k) may underflow in every channel: the result stays an average, the gradient that of fp64."""
    torch.manual_seed(0)
    q, k, v = (random(2, 3, 2, 8, 4, dtype=torch.float32) for _ in range(3))
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [(scale * x).to(dtype).requires_grad_() for x in (q, k)] + [v.to(dtype).requires_grad_()]
        out = retrieve(feature_map(inputs[0]), segment_updates(feature_map(inputs[1]), inputs[2]))
        assert out.abs().max() <= v.abs().max() + 1e-5
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for single, double in zip(*results, strict=True):
        assert_close(single.double(), double, rtol=1e-3, atol=1e-3 * double.detach().abs().max().item())


def test_empty_memory_gives_zero_and_no_nan():
    q = random(1, 2, 2, 3, 4, dtype=torch.float32).requires_grad_()
    nothing = MemoryState(*(x.expand(1, 2, *x.shape[1:]) for x in empty(2, 4, torch.float32)))
    out = retrieve(feature_map(q), nothing)
    assert torch.equal(out, torch.zeros_like(out))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_blend_gates_each_head_where_a_token_reads():
    torch.manual_seed(0)
    local, retrieved, beta = random(2, 3, 2, 4, 5), random(2, 3, 2, 4, 5), torch.tensor([-1.0, 2.0])
    read = torch.rand(2, 3, 4) > 0.5
    got = blend(local, retrieved, beta, read)
    for b, n, h, s in [(b, n, h, s) for b in range(2) for n in range(3) for h in range(2) for s in range(4)]:
        g = 1 / (1 + torch.exp(-beta[h].double())) if read[b, n, s] else torch.tensor(0.0)
        assert_close(got[b, n, h, s], g * retrieved[b, n, h, s] + (1 - g) * local[b, n, h, s])
    assert torch.equal(got.transpose(2, 3)[~read], local.transpose(2, 3)[~read])


def test_the_memory_is_never_in_low_precision():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        k = torch.randn(1, 2, 1, 3, 4).to(dtype)
        before, after = accumulate(empty(1, 4, dtype), segment_updates(feature_map(k), k))
        assert {x.dtype for x in (*before, *after)} == {torch.float32}
        assert blend(k, retrieve(feature_map(k), before), torch.zeros(1), k[..., 0, :, 0] > 9).dtype == dtype


def test_z_counts_exactly_over_a_thousand_segments():
    """In bf16 a sum stops growing at 256 times its terms."""
    k = torch.zeros(1, 1024, 1, 1, 2, dtype=torch.bfloat16)
    state = all_states(*accumulate(empty(1, 2, torch.bfloat16), segment_updates(feature_map(k), k)))
    assert torch.equal(state.z[0, :, 0, 0], torch.arange(1025.0))
