"""The gated delta rule: the last of several facts counts, what says nothing changes nothing, and it never amplifies.

That it equals a loop over tokens in models of every kind, its gradients included, is in test_model.py.
"""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from infini_ds.model import InfiniGPTNeoConfig
from infini_ds.model.gated_delta_rule import Associations
from infini_ds.model.memory_rule import RULES

RULE, D = RULES["gated_delta"], 8


def parameters(bias: float = 0.0) -> dict[str, torch.Tensor]:
    made = {
        name: x.detach().double() for name, x in RULE.parameters(InfiniGPTNeoConfig(num_heads=1, hidden_size=D)).items()
    }
    made["strength_bias"] += bias
    return made


def empty(dtype: torch.dtype = torch.float64) -> Associations:
    return RULE.empty_state(1, 1, D, dtype, "cpu")


def written(keys, values, bias=40.0, segments=1, mask=None) -> Associations:
    """The memory after tokens with these keys and values, (T, D), in equal segments, all of strength sigmoid(bias)."""
    k, v = (x.view(1, segments, 1, -1, D) for x in (keys, values))
    return RULE.write(empty(), k, v, mask, None, parameters(bias))[1]


def read(state: Associations, key: torch.Tensor) -> torch.Tensor:
    return RULE.read(key.view(1, 1, 1, 1, D), Associations(state.M[:, None]), parameters())[0, 0, 0, 0]


@pytest.mark.parametrize("segments", [1, 3, 6])
def test_the_last_of_several_facts_about_a_key_counts(segments):
    """In one segment as over several, with facts about other keys between."""
    keys, values = 20 * torch.eye(D, dtype=torch.float64), torch.randn(6, D, dtype=torch.float64)
    state = written(keys[[0, 1, 0, 2, 0, 1]], values, segments=segments)
    assert_close(read(state, keys[0]), values[4])
    assert_close(read(state, keys[1]), values[5])
    assert_close(read(state, keys[2]), values[3])
    assert_close(read(state, keys[3]), torch.zeros(D, dtype=torch.float64))


def test_a_token_of_no_strength_and_one_that_is_masked_leave_the_memory_as_it_is():
    keys, values = torch.randn(4, D, dtype=torch.float64), torch.randn(4, D, dtype=torch.float64)
    assert_close(written(keys, values, bias=-80.0).M, empty().M)
    mask = torch.tensor([True, True, False, False]).view(1, 1, 4)
    assert_close(written(keys, values, mask=mask).M, written(keys[:2], values[:2]).M)
    before = written(keys, values)
    nothing = torch.zeros(1, 1, 4, dtype=torch.bool)
    k, v = keys.view(1, 1, 1, 4, D), values.view(1, 1, 1, 4, D)
    assert torch.equal(RULE.write(before, k, v, nothing, None, parameters())[1].M, before.M)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alike", [False, True], ids=["random keys", "the same key all the time"])
def test_a_memory_to_which_zeros_are_written_does_not_grow(alike, dtype):
    """Over thousands of tokens of any key: a write takes away at most what the key returned."""
    torch.manual_seed(0)
    k = torch.randn(1, 40, 1, 128, D, dtype=dtype)
    if alike:
        k[:] = k[:, :1, :, :1]
    start = Associations(torch.randn(1, 1, D, D, dtype=dtype))
    own = {name: x.to(dtype) for name, x in parameters(40.0).items()}
    before, after = RULE.write(start, k, torch.zeros_like(k), None, None, own)
    norms = [torch.linalg.matrix_norm(M, 2).item() for M in (*before.M[0, :, 0], after.M[0, 0])]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(norms))


@pytest.mark.parametrize("extreme", [1e4, 1e20])
def test_extreme_keys_have_finite_gradients(extreme):
    own = {name: x.float().requires_grad_() for name, x in parameters().items()}
    k = torch.zeros(1, 1, 1, 4, D)
    k[..., 0] = extreme
    k.requires_grad_()
    _, after = RULE.write(empty(torch.float32), k, torch.ones_like(k), None, None, own)
    out = RULE.read(k, Associations(after.M[:, None]), own)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (k, *own.values()))
