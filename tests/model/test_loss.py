"""Losses: chunk by chunk, from hidden states and from the model, against cross-entropy on logits."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TINY, gradients, random_ids, tiny_model
from strategies import batches
from torch.testing import assert_close

from infini_ds.model import loss as chunked_loss
from infini_ds.model.loss import IGNORE_INDEX, summed_loss, token_losses

many = settings(deadline=None, max_examples=60, derandomize=True)
exact = {"rtol": 1e-9, "atol": 1e-11}


def random(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def test_training_with_labels_materializes_no_logits():
    model, ids = tiny_model().train(), random_ids(2, 9)
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, return_logits=True).logits.shape == (2, 9, TINY["vocab_size"])
    assert model(ids).logits is not None
    assert model.eval()(ids, labels=ids).logits is not None


def next_token_losses(logits, ids, labels, mask=None):
    """Return for each token (B, T) the loss of the next token in its row, whatever padding is in between."""
    losses = torch.zeros(ids.shape, dtype=logits.dtype)
    for b in range(ids.shape[0]):
        columns = [t for t in range(ids.shape[1]) if mask is None or mask[b, t]]
        for now, after in pairwise(columns):
            losses[b, now] = F.cross_entropy(logits[b, now], labels[b, after])
    return losses.nan_to_num(0.0)


@given(batches(), st.sampled_from([0.0, 0.5]), st.booleans())
@many
def test_losses_equal_cross_entropy_on_the_logits(batch, ignored, training):
    model, ids, mask, documents = batch
    model.train(training)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < ignored, -100)
    with torch.no_grad():
        out = {
            name: model(ids, mask, documents, labels=labels, loss_reduction=name, return_logits=True)
            for name in ("none", "sum", "mean")
        }
        losses = next_token_losses(out["none"].logits, ids, labels, mask)
        divided = model(ids, mask, documents, labels=labels, num_items_in_batch=7).loss
    assert out["none"].loss.shape == (ids.shape[0], ids.shape[1] - 1)
    assert_close(out["none"].loss, losses[:, :-1], **exact)
    assert_close(out["sum"].loss, losses.sum(), **exact)
    assert_close(divided, losses.sum() / 7, **exact)
    count = (losses != 0).sum()
    if count:
        assert_close(out["mean"].loss, losses.sum() / count, **exact)


def test_labels_are_shifted_like_gpt_neos():
    model, ids = tiny_model(), random_ids(3, 15)
    out = model(ids, labels=ids)
    assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), **exact)
    count = torch.tensor(4 * 14)
    assert_close(model(ids, labels=ids, num_items_in_batch=count).loss, out.loss * 3 * 14 / count, **exact)


def test_without_any_label_the_sum_is_zero_and_the_mean_nan():
    """The gradients of the sum are zero; the mean over no label is NaN, as in torch."""
    model, ids = tiny_model().train(), random_ids(2, 9)
    for inputs in (
        {"labels": torch.full_like(ids, -100)},
        {"labels": ids, "attention_mask": torch.zeros_like(ids)},
        {"labels": ids[:, :1], "input_ids": ids[:, :1]},
    ):
        loss = model(**({"input_ids": ids} | inputs), loss_reduction="sum").loss
        assert loss == 0
        assert not any(g.any() for g in gradients(loss, model).values())
        assert model(**({"input_ids": ids} | inputs)).loss.isnan()


def test_an_unknown_loss_reduction_is_rejected():
    model, ids = tiny_model(), random_ids(1, 3)
    with pytest.raises(ValueError, match="loss_reduction='max' is not one of mean, sum, none"):
        model(ids, labels=ids, loss_reduction="max")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_over_several_chunks(checkpointing, monkeypatch):
    """Computed in chunks of rows, the loss is the same one by one, summed, and inside of a checkpoint."""
    model = tiny_model(segments_per_block=200).train()
    monkeypatch.setattr(chunked_loss, "MAX_CHUNK_LOGITS", 300 * model.config.vocab_size)
    model.transformer.gradient_checkpointing = checkpointing
    ids = random_ids(2, 1301)
    want = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    want_gradients = gradients(want, model)
    for loss in (
        model(ids, labels=ids, loss_reduction="sum").loss,
        model(ids, labels=ids, loss_reduction="none").loss.sum(),
    ):
        assert_close(loss, want, **exact)
        assert_close(gradients(loss, model), want_gradients, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 39])
def test_losses_equal_cross_entropy_at_every_chunk(rows, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(chunked_loss, "MAX_CHUNK_LOGITS", 16 * 7)
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
