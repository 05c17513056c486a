"""Batches of rows as tensors, and the micro-batches that the model is called with.

Shapes: B rows, T tokens in a row.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from data_prep.packing import decode_row
from infini_ds.model.loss import IGNORE_INDEX


class _Tokens(TypedDict):
    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T)


class ModelInputs(_Tokens, total=False):
    """Keyword arguments of the model, int64. A mask is absent where it says nothing: the model is faster without it."""

    attention_mask: Tensor  # (B, T)
    document_ids: Tensor  # (B, T)


@dataclass(frozen=True)
class Batch:
    """Rows on the CPU, and what is known of them without looking at a tensor.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64, IGNORE_INDEX for padding and for tokens that are not to be predicted.
        attention_mask: (B, T) int64, 0 for padding; None if no row has padding.
        document_ids: (B, T) int64, documents numbered from 0 in each row, padding with its last document's number;
            None if each row is a single document.
        row_numbers: of each row in the data set, by which rows are skipped; empty for rows of no data set.
        predicted_tokens: number of labels that the loss is taken over. The first label of a row is never one.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    document_ids: Tensor | None
    row_numbers: list[int]
    predicted_tokens: int

    @classmethod
    def from_tensors(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        row_numbers: Sequence[int] = (),
    ) -> "Batch":
        """Return a batch without the masks that say nothing, and with its predicted tokens counted."""
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        if document_ids is not None and not document_ids.any():
            document_ids = None
        predicted = int((labels[:, 1:] != IGNORE_INDEX).sum())
        return cls(input_ids, labels, attention_mask, document_ids, list(row_numbers), predicted)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.input_ids)

    def __getitem__(self, rows: slice) -> "Batch":
        """Return some of the rows."""
        attention_mask = None if self.attention_mask is None else self.attention_mask[rows]
        document_ids = None if self.document_ids is None else self.document_ids[rows]
        numbers = self.row_numbers[rows]
        return Batch.from_tensors(self.input_ids[rows], self.labels[rows], attention_mask, document_ids, numbers)

    def __add__(self, other: "Batch") -> "Batch":
        """Return the rows of both batches, which have the same T."""
        return Batch.from_tensors(
            torch.cat([self.input_ids, other.input_ids]),
            torch.cat([self.labels, other.labels]),
            torch.cat([self.full_attention_mask(), other.full_attention_mask()]),
            torch.cat([self.full_document_ids(), other.full_document_ids()]),
            self.row_numbers + other.row_numbers,
        )

    def full_attention_mask(self) -> Tensor:
        """Return the attention mask, (B, T), also where it says nothing."""
        return torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask

    def full_document_ids(self) -> Tensor:
        """Return the document ids, (B, T), also where they say nothing."""
        return torch.zeros_like(self.input_ids) if self.document_ids is None else self.document_ids

    def document_spans(self) -> list[list[tuple[int, int]]]:
        """Return where the documents of each row lie, [first, last) in order, without the padding."""
        spans = []
        for mask, ids in zip(self.full_attention_mask(), self.full_document_ids(), strict=True):
            length = int(mask.sum())
            starts = (ids[1:length] != ids[: length - 1]).nonzero().flatten().add(1).tolist()
            spans.append(list(pairwise([0, *starts, length])))
        return spans

    def blank(self, row_numbers: Collection[int]) -> "Batch":
        """Return the batch with the rows of these numbers blank, all rows in their places.

        Nothing is predicted in a blank row, and nothing of its content is left that could make the loss or a gradient
        non-finite.
        """
        chosen = [number in row_numbers for number in self.row_numbers]
        if not any(chosen):
            return self
        rows = torch.tensor(chosen)[:, None]

        def fill(values: Tensor | None, value: int) -> Tensor | None:
            return None if values is None else values.masked_fill(rows, value)

        return Batch.from_tensors(
            self.input_ids.masked_fill(rows, 0),
            self.labels.masked_fill(rows, IGNORE_INDEX),
            fill(self.attention_mask, 1),
            fill(self.document_ids, 0),
            self.row_numbers,
        )

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which copies to a GPU are asynchronous.

        A DataLoader with `pin_memory=True` calls this.
        """

        def pin(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.pin_memory()

        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            attention_mask=pin(self.attention_mask),
            document_ids=pin(self.document_ids),
        )

    def micro_batches(self, rows: int, device: torch.device | str) -> Iterator[ModelInputs]:
        """Yield the batch in parts of `rows` rows, on `device`, as arguments of the model.

        A mask that says nothing of the rows of one part is left out of that part. Both are decided on the CPU.
        """
        for first in range(0, len(self), rows):
            part = slice(first, first + rows)
            inputs: ModelInputs = {"input_ids": self.input_ids[part], "labels": self.labels[part]}
            if self.attention_mask is not None and not self.attention_mask[part].all():
                inputs["attention_mask"] = self.attention_mask[part]
            if self.document_ids is not None and self.document_ids[part].any():
                inputs["document_ids"] = self.document_ids[part]
            yield cast(ModelInputs, _to_device(cast(dict[str, Tensor], inputs), device))


def _to_device(tensors: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    return {name: values.to(device, non_blocking=True) for name, values in tensors.items()}


def collate(samples: list[dict[str, np.ndarray]], first_row: int = 0) -> Batch:
    """Return the batch of some rows as MDS stores them, each with its number under `row`, counted from `first_row`."""
    rows = [decode_row(sample) for sample in samples]
    input_ids = torch.from_numpy(np.stack([row.input_ids for row in rows]))
    T = input_ids.shape[1]
    document_ids, masks = [], []
    for row in rows:
        lengths = torch.from_numpy(row.document_lengths)
        ids = torch.arange(len(lengths)).repeat_interleave(lengths)
        padding = T - len(ids)
        document_ids.append(torch.cat([ids, ids[-1:].expand(padding)]))
        masks.append(torch.arange(T) < len(ids))
    attention_mask = torch.stack(masks)
    labels = input_ids.masked_fill(~attention_mask, IGNORE_INDEX)
    if any(row.loss_mask is not None for row in rows):
        loss_masks = [np.ones(T, bool) if row.loss_mask is None else row.loss_mask for row in rows]
        labels = labels.masked_fill(~torch.from_numpy(np.stack(loss_masks)), IGNORE_INDEX)
    numbers = [first_row + int(sample["row"]) for sample in samples]
    return Batch.from_tensors(input_ids, labels, attention_mask.long(), torch.stack(document_ids), numbers)


def pad_documents(documents: list[list[int]]) -> Batch:
    """Return a batch of one document a row, padded at the end to the longest."""
    T = max(map(len, documents))
    input_ids = torch.zeros(len(documents), T, dtype=torch.long)
    for row, ids in zip(input_ids, documents, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    attention_mask = torch.arange(T) < torch.tensor([len(ids) for ids in documents])[:, None]
    labels = input_ids.masked_fill(~attention_mask, IGNORE_INDEX)
    return Batch.from_tensors(input_ids, labels, attention_mask.long())


def batches_by_length(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Return the indices of rows in batches of rows of similar length.

    A batch has up to `batch_tokens` tokens, padding included, or a single row.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches
