"""Documents of every kind of source: order, encodings, compression, and what is not text."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from preparing import SMALL, TEXTS, assert_fails, read, read_texts

from data_prep.prepare import PrepareOptions, prepare
from infini_ds.utils.errors import UserError


def test_stdlib_is_sorted_deterministic_and_survives_broken_files():
    first = read("stdlib")
    names = [document.name for document in first]
    assert names[0].startswith("pydoc topic") and "argparse.py" in names
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert any(document.text is None for document in first)
    assert first == read("stdlib")


def test_stdlib_modules_are_stdlib_without_tests_and_encodings():
    folders = ("test", "tests", "idle_test", "encodings")
    expected = [document for document in read("stdlib") if not set(document.name.split("/")[:-1]) & set(folders)]
    assert read("stdlib-modules") == expected
    names = {document.name for document in expected}
    assert {"argparse.py", "asyncio/tasks.py", "pydoc topic if"} <= names and "encodings/cp1252.py" not in names


def test_text_folder_in_order(folder):
    assert read_texts(f"text:{folder}") == TEXTS


@pytest.mark.parametrize("form", ["plain", "gz", "zst in two frames", "list"])
def test_jsonl(tmp_path, form):
    lines = [json.dumps({"text": text, "n": index % 2 or "odd"}) + "\n" for index, text in enumerate(TEXTS)]
    first, second = ("".join(part).encode() for part in (lines[:30], lines[30:]))
    if form == "gz":
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(first + second))
    elif form == "zst in two frames":
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(first) + zstandard.compress(second))
    else:
        (tmp_path / "a.jsonl").write_bytes(first)
        (tmp_path / "b.jsonl").write_bytes(second)
    files = f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl" if form == "list" else f"{tmp_path}/*.jsonl*"
    assert read_texts(f"jsonl:{files}") == TEXTS


def test_parquet_and_hugging_face_folder(tmp_path):
    table = pyarrow.table({"body": TEXTS, "n": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table.slice(0, 50), tmp_path / "train.parquet")
    pyarrow.parquet.write_table(table.slice(50), tmp_path / "validation.parquet")
    assert read_texts(f"parquet:{tmp_path}/*.parquet", text_column="body") == TEXTS
    assert read_texts(f"hf:{tmp_path}", text_column="body") == TEXTS[:50]
    out = tmp_path / "out"
    source = f"hf:{tmp_path}"
    options = SMALL | {"source": source, "out": out, "text_column": "body"}
    manifest = prepare(PrepareOptions(**options, validation_split="validation"), quiet=True)
    assert (manifest.train.documents, manifest.validation.documents) == (50, 10)
    assert_fails(["--source", "--split test"], **options | {"out": tmp_path / "x", "split": "test"})


def test_null_column_counts_as_empty_and_half_a_surrogate_as_bad_utf8(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": null}\n\n{"text": "a\\ud800b"}\n')
    assert read_texts(f"jsonl:{file}", bad_utf8="skip") == ["", None]
    assert read_texts(f"jsonl:{file}", bad_utf8="replace") == ["", "a\ufffd\ufffd\ufffdb"]
    with pytest.raises(UserError, match="line 3 is not UTF-8 at byte 1"):
        read_texts(f"jsonl:{file}")


def test_document_separator_divides_files(tmp_path):
    """Files as TinyStories' are: documents between lines of <|endoftext|>, at the start and end of a file too."""
    (tmp_path / "a.txt").write_text("Once.\n\nThe end.\n<|endoftext|>\n\nTwice <|endoftext|> here.\n<|endoftext|>\r\n")
    (tmp_path / "b.txt").write_bytes(b"<|endoftext|>\nThrice\n<|endoftext|>\nbad \xff")
    found = read(f"text:{tmp_path}", document_separator="<|endoftext|>", bad_utf8="skip")
    texts = ["Once.\n\nThe end.\n", "\nTwice <|endoftext|> here.\n", "", "", "Thrice\n", None]
    assert [document.text for document in found] == texts
    with pytest.raises(UserError, match=r"b.txt document 3 is not UTF-8 at byte 39;"):
        read_texts(f"text:{tmp_path}", document_separator="<|endoftext|>")

    options = {"source": f"text:{tmp_path}", "out": tmp_path / "out", "bad_utf8": "replace"} | SMALL
    options |= {"vocab_size": 260, "validation_fraction": 0.5, "sequence_length": 16}
    manifest = prepare(PrepareOptions(**options, document_separator="<|endoftext|>"), quiet=True)
    assert manifest.train.documents + manifest.validation.documents == 4 and manifest.skipped.empty == 2
    with pytest.raises(UserError, match=r"--document-separator <\|endoftext\|> there, x here"):
        prepare(PrepareOptions(**options, document_separator="x"), quiet=True)
    for wrong, source in ((" x", f"text:{tmp_path}"), ("", f"text:{tmp_path}"), ("x", "stdlib")):
        with pytest.raises(UserError, match="--document-separator"):
            prepare(PrepareOptions(**options | {"source": source}, document_separator=wrong), quiet=True)


def test_bad_utf8_and_missing_columns(folder, tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    for index, text in enumerate(TEXTS[:30]):
        (source / f"{index:02}.txt").write_text(text)
    (source / "07.txt").write_bytes(b"caf\xe9 au lait")
    options = SMALL | {"source": f"text:{source}", "out": tmp_path / "out"}
    assert_fails(["--bad-utf8", "07.txt", "byte 3", "replace or skip"], **options)
    manifest = prepare(PrepareOptions(**options | {"bad_utf8": "skip"}), quiet=True)
    assert manifest.skipped.undecodable == 1 and manifest.train.documents + manifest.validation.documents == 29
    manifest = prepare(PrepareOptions(**options | {"bad_utf8": "replace", "force": True}), quiet=True)
    assert manifest.skipped.repaired == 1 and manifest.train.documents + manifest.validation.documents == 30
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": [1] * 60}), tmp_path / "a.parquet")
    options = options | {"source": f"parquet:{tmp_path}/a.parquet", "out": tmp_path / "x"}
    assert_fails(["--text-column text", "body, n"], **options)
    assert_fails(["--text-column n", "int64"], **options | {"text_column": "n"})
