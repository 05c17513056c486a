"""Rows against the documents they were made from: packing, tokens, splits, and the result for any number of workers."""

import json
from pydoc_data.topics import topics

import numpy as np
import pytest
from preparing import SMALL, TEXTS, written_files
from shards import read_rows, read_token_documents
from transformers import AutoTokenizer

from data_prep.packing import Packer, Row, decode_row, encode_row, mds_columns, token_dtype
from data_prep.prepare import PrepareOptions, load_manifest, prepare
from data_prep.splits import text_hash
from infini_ds.streaming_compat.library import MDSWriter, StreamingDataset


def test_dtype_rule():
    assert [token_dtype(size) for size in (2, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def test_rows_of_earlier_versions_are_read(tmp_path):
    """Their loss mask was the column `learned`."""
    rows = [Row(np.arange(8, dtype=np.uint16), np.array([5, 3], np.uint32), np.arange(8) % 3 > 0) for _ in range(3)]
    columns = mds_columns(8, 100, has_loss_mask=True)
    columns["learned"] = columns.pop("loss_mask")
    with MDSWriter(columns=columns, out=str(tmp_path)) as writer:
        for row in rows:
            sample = encode_row(row)
            sample["learned"] = sample.pop("loss_mask")
            writer.write(sample)
    for row, found in zip(rows, read_rows(tmp_path), strict=True):
        assert found.loss_mask.dtype == bool and np.array_equal(found.loss_mask, row.loss_mask)
        assert np.array_equal(found.input_ids, row.input_ids)


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_packer_against_plain_concatenation(vocab_size):
    random = np.random.default_rng(0)
    documents = [random.integers(1, vocab_size, random.integers(1, 40)) for _ in range(50)]
    packer = Packer(16, vocab_size, pad_id=0)
    rows = [row for ids in documents for row in packer.add(ids, True)] + list(packer.finish())
    flat = np.concatenate(documents)
    assert all(row.input_ids.dtype == token_dtype(vocab_size) and len(row.input_ids) == 16 for row in rows)
    assert np.array_equal(np.concatenate([row.input_ids for row in rows])[: len(flat)], flat)
    ends = {int(end) for end in np.cumsum([len(ids) for ids in documents])}
    cuts = np.concatenate([16 * index + np.cumsum(row.document_lengths) for index, row in enumerate(rows)])
    assert set(cuts.tolist()) == ends | {16 * index for index in range(1, len(flat) // 16 + 1)}
    assert sum(int(row.document_lengths.sum()) for row in rows) == len(flat)


def test_round_trip_gives_every_document_in_order(prepared):
    manifest = load_manifest(prepared)
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    bound = SMALL["validation_fraction"] * 2**64
    for split, counts in (("train", manifest.train), ("validation", manifest.validation)):
        texts = [text for text in TEXTS if (text_hash(text) < bound) == (split == "validation")]
        documents = read_token_documents(prepared / split, manifest.tokenizer.start_id)
        assert [tokenizer.decode(ids[1:]) for ids in documents] == texts
        assert documents == [[0, *tokenizer(text)["input_ids"]] for text in texts]
        rows = read_rows(prepared / split)
        assert counts.documents == len(texts) and counts.rows == len(rows)
        assert counts.bytes == sum(len(text.encode()) for text in texts)
        assert counts.tokens == sum(map(len, documents)) == sum(int(row.document_lengths.sum()) for row in rows)
        assert all(row.document_lengths.sum() == 128 for row in rows[:-1])
        assert set(rows[-1].input_ids[rows[-1].document_lengths.sum() :]) <= {manifest.tokenizer.pad_id}
    assert manifest.token_dtype == "uint16" and "ndarray:uint16:128" in (prepared / "train/index.json").read_text()


def test_streaming_dataset_reads_the_compressed_shards(prepared):
    dataset = StreamingDataset(local=str(prepared / "validation"), shuffle=False, batch_size=1, validate_hash="xxh64")
    rows = [decode_row(sample).input_ids.tolist() for sample in dataset]
    del dataset
    assert rows == [row.input_ids.tolist() for row in read_rows(prepared / "validation")]


def test_the_tokenizer_is_an_ordinary_one(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    assert tokenizer.is_fast and len(tokenizer) == 400
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id] == [
        0,
        0,
        0,
        1,
    ]
    text = "  spaces,\ttabs\r\nand 東京 \U0001f40d"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_workers_do_not_change_the_result_of_long_documents(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    for index, repeat in enumerate((1, 4, 1, 1)):  # 700 kB each time: one document runs through several batches
        (source / f"{index}.txt").write_text(f"{index} " + "".join(topics.values()) * repeat)
    options = SMALL | {"source": f"text:{source}", "tokenizer_bytes": 200_000, "shard_bytes": 1 << 20}
    options["validation_fraction"] = 0.4
    for workers in (1, 2):
        prepare(PrepareOptions(**options | {"out": tmp_path / f"{workers}", "workers": workers}), quiet=True)
    one, two = written_files(tmp_path / "1"), written_files(tmp_path / "2")
    assert one == two and sum(path.suffix == ".zstd" for path in one) > 4


def test_duplicates_fall_on_one_side(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, *reversed(TEXTS)]))
    out = tmp_path / "out"
    manifest = prepare(PrepareOptions(source=f"jsonl:{source}", out=out, **SMALL), quiet=True)
    assert manifest.train.documents + manifest.validation.documents == 120
    sides = [{tuple(ids) for ids in read_token_documents(out / split, 0)} for split in ("train", "validation")]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == len(set(TEXTS))


def test_separate_validation_is_left_out_of_training(folder, tmp_path):
    (tmp_path / "held").mkdir()
    for index, text in enumerate([*TEXTS[:7], "seen nowhere else", " \n"]):
        (tmp_path / "held" / f"{index}.txt").write_text(text)
    options = SMALL | {"source": f"text:{folder}", "validation_source": f"text:{tmp_path / 'held'}"}
    manifest = prepare(PrepareOptions(**options, out=tmp_path / "out"), quiet=True)
    assert (manifest.train.documents, manifest.validation.documents) == (53, 8)
    assert (manifest.skipped.duplicates, manifest.skipped.empty) == (7, 1)


def test_a_text_that_spells_the_end_token_does_not_end(tmp_path, prepared):
    for index in range(4):
        (tmp_path / f"{index}.txt").write_text(f"{index} once<|endoftext|>upon")
    out = tmp_path / "out"
    options = SMALL | {"validation_fraction": 0.5, "tokenizer": str(prepared / "tokenizer")}
    manifest = prepare(PrepareOptions(source=f"text:{tmp_path}", out=out, **options), quiet=True)
    documents = [ids for split in ("train", "validation") for ids in read_token_documents(out / split, 0)]
    assert len(documents) == 4 and all(ids.count(0) == 1 for ids in documents) and manifest.tokenizer.kind == "loaded"
