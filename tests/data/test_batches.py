"""Batches: their masks, micro-batches, blank rows, and the way through a DataLoader's workers."""

from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data_prep.packing import Row, encode_row
from infini_ds.data.batches import Batch, collate, pad_documents
from infini_ds.data.skip_rows import SkipRows
from infini_ds.model.loss import IGNORE_INDEX

T = 8
# Tokens of each document in a row: one document, several, and rows with padding, in micro-batches of two.
PACKED = [[8], [8], [3, 5], [8], [8], [6], [2, 2], [8]]


def sample(lengths: list[int], number: int, masked: bool = False) -> dict[str, np.ndarray]:
    """A row as MDS stores it, of tokens that are all different."""
    ids = np.arange(10 * number + 1, 10 * number + 1 + T, dtype=np.uint16)
    loss_mask = np.arange(T) % 3 == 0 if masked else None
    return encode_row(Row(ids, np.array(lengths, np.uint32), loss_mask)) | {"row": number}


def samples(masked: bool = False) -> list[dict[str, np.ndarray]]:
    return [sample(lengths, number, masked) for number, lengths in enumerate(PACKED)]


def equal(a: Batch, b: Batch) -> bool:
    def same(x, y) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y

    return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(Batch))


@pytest.mark.parametrize("masked", [False, True])
def test_micro_batches_hold_what_the_rows_say(masked):
    """Written out token by token; a mask is there exactly where it says something of these two rows."""
    batch = collate(samples(masked))
    total = 0
    for part, inputs in enumerate(batch.micro_batches(2, "cpu")):
        rows = PACKED[2 * part : 2 * part + 2]
        padded, several = any(sum(row) < T for row in rows), any(len(row) > 1 for row in rows)
        assert ("attention_mask" in inputs, "document_ids" in inputs) == (padded, several)
        for i, lengths in enumerate(rows):
            number = 2 * part + i
            for t in range(T):
                token, real = 10 * number + 1 + t, t < sum(lengths)
                document = next((d for d in range(len(lengths)) if t < sum(lengths[: d + 1])), len(lengths) - 1)
                predicted = real and (not masked or t % 3 == 0)
                assert inputs["input_ids"][i, t] == token
                assert inputs["labels"][i, t] == (token if predicted else IGNORE_INDEX)
                assert not padded or inputs["attention_mask"][i, t] == real
                assert not several or inputs["document_ids"][i, t] == document
                total += predicted and t > 0
    assert batch.predicted_tokens == total and batch.row_numbers == list(range(len(PACKED))) and len(batch) == 8


def test_a_batch_without_padding_and_of_single_documents_has_no_masks():
    batch = collate([sample([8], 0), sample([8], 1)])
    assert batch.attention_mask is None and batch.document_ids is None and batch.predicted_tokens == 2 * (T - 1)
    assert batch.full_attention_mask().all() and not batch.full_document_ids().any()


def test_blank_rows_keep_their_place_and_change_no_other():
    batch = collate(samples())
    blank = batch.blank({2, 6, 99})
    others = [0, 1, 3, 4, 5, 7]
    assert (blank.labels[[2, 6]] == IGNORE_INDEX).all() and not blank.input_ids[[2, 6]].any()
    assert blank.attention_mask[[2, 6]].all() and not blank.full_document_ids().any()  # no other row has two documents
    for before, after in ((batch.input_ids, blank.input_ids), (batch.labels, blank.labels)):
        assert torch.equal(before[others], after[others])
    assert torch.equal(batch.attention_mask[others], blank.attention_mask[others])
    assert blank.row_numbers == batch.row_numbers
    assert blank.predicted_tokens == sum(sum(PACKED[row]) - 1 for row in others)
    assert batch.blank({99}) is batch
    assert batch.blank(set(range(8))).predicted_tokens == 0


def test_skip_rows_is_a_stream_with_some_rows_blank():
    class Stream(SimpleNamespace):
        def __iter__(self):
            return iter(self.batches)

        def state_dict(self):
            return {"at": len(self.batches)}

        def at(self, state):
            return Stream(batches=self.batches[-state["at"] :], waited=0.0)

    batches = [collate([sample([8], number)]) for number in range(4)]
    stream = SkipRows(Stream(batches=batches, waited=1.5), {1, 3})
    assert [batch.predicted_tokens for batch in stream] == [7, 0, 7, 0]
    assert equal(next(iter(stream)), batches[0])
    assert (stream.waited, stream.state_dict()) == (1.5, {"at": 4})
    assert [batch.predicted_tokens for batch in stream.at({"at": 2})] == [7, 0]


def test_parts_and_sums_of_batches():
    batch = collate(samples())
    assert equal(batch[:3] + batch[3:], batch)
    assert batch[:2].document_ids is None and batch[:2].attention_mask is None
    assert batch[5:].row_numbers == [5, 6, 7]
    assert batch.document_spans()[2] == [(0, 3), (3, 8)] and batch.document_spans()[6] == [(0, 2), (2, 4)]


def test_padded_documents():
    batch = pad_documents([[5, 6, 7], [8], [1, 2]])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0], [1, 2, 0]]
    assert batch.labels[1].tolist() == [8, IGNORE_INDEX, IGNORE_INDEX]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]] and batch.document_ids is None
    assert batch.document_spans() == [[(0, 3)], [(0, 1)], [(0, 2)]] and batch.predicted_tokens == 3
    assert pad_documents([[1, 2], [3, 4]]).attention_mask is None


def test_batches_come_whole_out_of_worker_processes():
    expected = [collate(samples()[first : first + 2]) for first in (0, 2, 4, 6)]
    loader = DataLoader(samples(), batch_size=2, num_workers=2, collate_fn=collate)
    assert all(equal(a, b) for a, b in zip(loader, expected, strict=True))


def test_pinned_batches_stay_the_same(monkeypatch):
    """A DataLoader pins a batch by its own method; without a GPU there is nothing to pin, so the calls are counted."""
    batch, pinned = collate(samples()), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: pinned.append(values) or values.clone())
    from torch.utils.data._utils.pin_memory import pin_memory

    result = pin_memory(batch)
    assert equal(result, batch) and result is not batch and len(pinned) == 4
    pinned.clear()
    assert pin_memory(replace(batch, document_ids=None, attention_mask=None)).attention_mask is None
    assert len(pinned) == 2
