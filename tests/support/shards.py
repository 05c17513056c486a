"""Reading back the shards that data_prep wrote."""

from pathlib import Path

import zstandard

from data_prep.packing import decode_row
from infini_ds.streaming_compat.library import LocalDataset


def read_rows(split):
    """Rows of a split. LocalDataset reads no compressed shards, so they are expanded beside themselves."""
    for path in Path(split).glob("*.zstd"):
        path.with_suffix("").write_bytes(zstandard.ZstdDecompressor().decompress(path.read_bytes()))
    dataset = LocalDataset(str(split))
    return [decode_row(dataset[index]) for index in range(len(dataset))]


def read_token_documents(split, start_id):
    """The documents' tokens, put together from the rows by their lengths; a start token opens each."""
    documents = []
    for row in read_rows(split):
        begin = 0
        for length in row.document_lengths:
            piece = row.input_ids[begin : begin + length].tolist()
            documents.append(piece) if piece[0] == start_id else documents[-1].extend(piece)
            begin += length
    return documents
