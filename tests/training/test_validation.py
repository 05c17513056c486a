"""Validation: losses by position, the same however the rows are divided."""

import pytest
import torch

from infini_ds.config.training_data import find_sources
from infini_ds.conversion.locate import load_model, locate
from infini_ds.data.streams import ValidationRows
from infini_ds.training.validation import position_losses


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
