"""Local attention and rotary positions."""

import torch
from torch.testing import assert_close

from infini_ds.model.local_attention import local_attention, rotary_angles, rotate


def random(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def test_local_attention_does_not_scale_its_scores():
    torch.manual_seed(0)
    q, k, v = (random(1, 1, 3, 16) for _ in range(3))
    scores = (q @ k.transpose(-1, -2)).masked_fill(~torch.ones(3, 3).tril().bool(), -torch.inf)
    assert_close(local_attention(q, k, v, None), scores.softmax(-1) @ v)


def test_rotary_scores_depend_only_on_the_distance():
    torch.manual_seed(0)
    q, k = random(8), random(8)

    def score(i: int, j: int) -> torch.Tensor:
        at = rotary_angles(torch.tensor([i, j]), 8, 10000.0)
        return rotate(q, at[0][0], at[1][0]) @ rotate(k, at[0][1], at[1][1])

    assert_close(score(7, 3), score(19, 15), rtol=0, atol=1e-5)
    assert_close(score(5, 5), q @ k, rtol=0, atol=1e-6)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-2
