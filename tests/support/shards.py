"""Shards that were written: read back without a dataset, opened as training opens them, and damaged."""

from pathlib import Path

import zstandard

from data_prep.packing import Row, decode_row
from infini_ds.streaming_compat.dataset import ShardDataset
from infini_ds.streaming_compat.library import LocalDataset
from infini_ds.streaming_compat.stream import ShardStream


def read_rows(split: Path) -> list[Row]:
    """Return the rows of a split. LocalDataset reads no compressed shards, so they are expanded beside themselves."""
    for path in split.glob("*.zstd"):
        path.with_suffix("").write_bytes(zstandard.ZstdDecompressor().decompress(path.read_bytes()))
    dataset = LocalDataset(str(split))
    return [decode_row(dataset[index]) for index in range(len(dataset))]


def read_token_documents(split: Path, start_id: int) -> list[list[int]]:
    """Return the documents' tokens, combined from the rows by their lengths; each document begins with `start_id`."""
    documents: list[list[int]] = []
    for row in read_rows(split):
        begin = 0
        for length in row.document_lengths:
            piece = row.input_ids[begin : begin + length].tolist()
            documents.append(piece) if piece[0] == start_id else documents[-1].extend(piece)
            begin += length
    return documents


def open_dataset(folder: Path, remote: Path | None = None) -> ShardDataset:
    """Return the rows of `folder`/train in order, fetched from `remote` if that is given."""
    stream = ShardStream(local=str(folder), split="train", remote_folder=remote and str(remote), bounded=False)
    return ShardDataset(streams=[stream], batch_size=2, shuffle=False)


def flip(file: Path) -> None:
    """Change one bit of the last byte."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
