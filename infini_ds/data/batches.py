"""Rows into batches of tensors, and batches into micro-batches.

Shapes: B rows, T tokens in a row.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data_prep.packing import decode_row
from infini_ds.model.loss import IGNORE_INDEX


def collate(samples: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Rows as `ShardDataset` gives them -> `input_ids`, `document_ids`, `attention_mask` and `labels`, all (B, T), and
    `row_numbers` (B,), all int64.

    Documents are numbered from 0 in each row; padding has mask 0, label -100 and the number of the last document. Where
    a row says which of its tokens are to be learned, the others have label -100 too.
    """
    rows = [decode_row(sample) for sample in samples]
    input_ids = torch.from_numpy(np.stack([row.input_ids for row in rows]))
    T = input_ids.shape[1]
    numbers, masks = [], []
    for row in rows:
        lengths = torch.from_numpy(row.document_lengths)
        number = torch.arange(len(lengths)).repeat_interleave(lengths)
        padding = T - len(number)
        numbers.append(torch.cat([number, number[-1:].expand(padding)]))
        masks.append(torch.arange(T) < len(number))
    attention_mask = torch.stack(masks)
    labels = input_ids.masked_fill(~attention_mask, IGNORE_INDEX)
    if any(row.learned is not None for row in rows):
        learned = [np.ones(T, bool) if row.learned is None else row.learned for row in rows]
        labels = labels.masked_fill(~torch.from_numpy(np.stack(learned)), IGNORE_INDEX)
    return {
        "input_ids": input_ids,
        "document_ids": torch.stack(numbers),
        "attention_mask": attention_mask.long(),
        "labels": labels,
        "row_numbers": torch.tensor([int(sample["row"]) for sample in samples]),
    }


def blank_rows(batch: dict[str, Tensor], numbers: set[int]) -> dict[str, Tensor]:
    """The batch with these rows, by number, blank: nothing is predicted in them, and nothing of their content is left
    that could make a loss or a gradient of the others infinite. All else stays in its place.
    """
    blank = torch.tensor([row in numbers for row in batch["row_numbers"].tolist()])[:, None]
    content = {"input_ids": 0, "document_ids": 0, "attention_mask": 1, "labels": IGNORE_INDEX}
    return batch | {name: batch[name].masked_fill(blank, value) for name, value in content.items()}


def predicted_tokens(batch: dict[str, Tensor]) -> int:
    """How many tokens of the batch the loss is taken over: all labels that count, but the first of each row."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def micro_batches(batch: dict[str, Tensor], rows: int, device: torch.device | str) -> Iterator[dict[str, Tensor]]:
    """Cut the batch into parts of `rows` rows on `device`, as arguments of the model.

    Masks that say nothing are left out (no padding, one document a row): the model has a faster path without them.
    """
    for first in range(0, len(batch["input_ids"]), rows):
        part = {name: values[first : first + rows] for name, values in batch.items() if name != "row_numbers"}
        if part["attention_mask"].all():
            del part["attention_mask"]
        if not part["document_ids"].any():
            del part["document_ids"]
        yield {name: values.to(device, non_blocking=True) for name, values in part.items()}
