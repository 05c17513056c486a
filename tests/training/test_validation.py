"""Validation: losses by position, the same however the rows are divided."""

import pytest
import torch

from infini_ds.config.training_data import find_sources
from infini_ds.conversion.locate import load_model, locate
from infini_ds.data.streams import ValidationRows
from infini_ds.training.validation import PositionLosses, gain_standard_error, position_losses


@pytest.fixture
def trained(runs, shards):
    return load_model(locate(runs / "one")), ValidationRows(find_sources(str(shards), [], ""))


def test_losses_do_not_depend_on_micro_rows(trained):
    model, rows = trained
    one_by_one = position_losses(model, rows, None, 1)
    all_at_once = position_losses(model, rows, None, 64)
    assert torch.allclose(one_by_one.loss, all_at_once.loss, atol=1e-4)
    assert torch.equal(one_by_one.count, all_at_once.count)
    off = position_losses(model, rows, None, 64, use_memory=False)
    assert torch.allclose(off.loss[:30], all_at_once.loss[:30], atol=1e-4)  # the first segment has no memory to read
    assert not torch.allclose(off.loss[40:], all_at_once.loss[40:], atol=1e-3)


def test_an_aborted_validation_has_no_result_and_leaves_the_mode(trained):
    model, rows = trained
    model.train()
    done = []
    assert position_losses(model, rows, 3, 1, on_batch=lambda: done.append(1), abort=lambda: len(done) == 2) is None
    assert len(done) == 2 and model.training


def test_the_standard_error_of_the_gain_is_that_of_segments():
    """As the spread of the mean gain over random draws, whose noise is alike within a segment."""
    draws, segments, length = 4000, 50, 8
    generator = torch.Generator().manual_seed(0)
    count = torch.full((segments * length,), 16.0, dtype=torch.float64)
    gains = 0.3 * torch.randn(draws, segments, generator=generator, dtype=torch.float64).repeat_interleave(length, 1)
    off = torch.full_like(count, 16 * 5.0)
    pairs = [(PositionLosses(off - 16 * gain, count), PositionLosses(off, count)) for gain in gains]
    means = torch.tensor([off.mean - on.mean for on, off in pairs], dtype=torch.float64)
    errors = torch.tensor([gain_standard_error(on, off, length) for on, off in pairs], dtype=torch.float64)
    assert errors.mean().item() == pytest.approx(means.std().item(), rel=0.05)
    assert gain_standard_error(*pairs[0], segments * length) == 0.0
