"""Damaged and mixed input: what can be read is read, and what cannot be is named in one sentence."""

import gzip
import json
import os
import random
import time

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from preparing import SMALL, TEXTS, assert_fails, read, read_texts

from data_prep.prepare import PrepareOptions, prepare
from data_prep.splits import DrawnShares, SkipCounts, split_documents
from data_prep.tokenizer import train_tokenizer
from infini_ds.utils.errors import UserError


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def sentence_of(source, **options):
    with pytest.raises(UserError) as error:
        read(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_truncated_or_damaged_file_is_named(tmp_path):
    noise = random.Random(0).randbytes(100_000).hex()
    lines = json_lines(*({"text": noise[i : i + 100]} for i in range(0, len(noise), 100))).encode()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:50_000])
    (tmp_path / "zero.jsonl.gz").touch()
    (tmp_path / "wrong.jsonl.gz").write_bytes(lines)
    assert f"{tmp_path}/cut.jsonl.gz cannot be read after line" in sentence_of(f"jsonl:{tmp_path}/cut.jsonl.gz")
    assert f"{tmp_path}/zero.jsonl.gz has 0 bytes" in sentence_of(f"jsonl:{tmp_path}/zero.jsonl.gz")
    assert f"{tmp_path}/wrong.jsonl.gz cannot be read after line 0" in sentence_of(f"jsonl:{tmp_path}/*wrong*")

    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [noise[i : i + 100] for i in range(0, 190_000, 50)]})
    pyarrow.parquet.write_table(table, file, write_page_checksum=True, use_dictionary=False, compression="none")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bit.parquet").write_bytes(data)
    data[5000:9000] = bytes(4000)
    (tmp_path / "page.parquet").write_bytes(data)
    (tmp_path / "cut.parquet").write_bytes(data[:9000])
    for name in ("bit", "page"):
        assert f"{tmp_path}/{name}.parquet is damaged after row" in sentence_of(f"parquet:{tmp_path}/{name}.parquet")
    assert f"{tmp_path}/cut.parquet is not a Parquet file" in sentence_of(f"parquet:{tmp_path}/cut.parquet")
    assert "is damaged after row" in sentence_of(f"hf:{_folder(tmp_path / 'hf', 'page.parquet', data)}")


def _folder(folder, name, data):
    folder.mkdir()
    (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("first", "second", "texts"),
    [
        ({"text": "x", "n": 1}, {"text": "y", "n": "s"}, ["x", "y"]),
        ({"text": "x", "n": {"a": 1}}, {"text": "y", "n": [1]}, ["x", "y"]),
        ({"text": "x", "n": None}, {"text": "y", "n": "s"}, ["x", "y"]),
        ({"text": None}, {"text": "y"}, ["", "y"]),
        ({"text": "x"}, {"text": "y", "n": 1}, ["x", "y"]),
        ({"n": 1}, {"text": "y"}, ["", "y"]),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_only_the_text_column_of_a_hugging_face_folder_matters(first, second, texts, form, tmp_path):
    for name, row in (("a", first), ("b", second)):
        if form == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
        else:
            text = json.dumps([row], indent=1) if form == "json" else json_lines(row)
            (tmp_path / f"{name}.{form}").write_text(text)
    if form == "parquet" and "text" not in first:
        assert "a.parquet has no such column" in sentence_of(f"hf:{tmp_path}")
    else:
        assert read_texts(f"hf:{tmp_path}") == texts
        assert "--text-column body" in sentence_of(f"hf:{tmp_path}", text_column="body")


def test_a_hugging_face_folder_is_read_as_datasets_reads_it(tmp_path):
    """Splits by folder, subsets by README.md, files of other kinds, a column that is not text."""
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    for split in ("train", "test"):
        (tmp_path / split / "b.jsonl").write_text(json_lines({"text": f"{split} 1"}, {"text": f"{split} 2"}))
    for split in ("train", "test"):
        streamed = datasets.load_dataset(str(tmp_path), split=split, streaming=True)
        assert (
            read_texts(f"hf:{tmp_path}", split=split)
            == [row["text"] for row in streamed]
            == [f"{split} {i}" for i in (1, 2)]
        )
    assert "--split dev" in sentence_of(f"hf:{tmp_path}", split="dev")
    configs = "---\nconfigs:\n- {config_name: a, data_files: train/*}\n- {config_name: b, data_files: test/*}\n---\n"
    (tmp_path / "README.md").write_text(configs)
    assert read_texts(f"hf:{tmp_path}", subset="b") == ["test 1", "test 2"]
    assert "--split train" in sentence_of(f"hf:{tmp_path}")  # which of the two?
    other = tmp_path / "csv"
    other.mkdir()
    (other / "a.csv").write_text("text,n\nx,1\ny,two\n")
    assert read_texts(f"hf:{other}") == ["x", "y"]
    assert "--text-column n" in sentence_of(f"hf:{other}", text_column="none")
    (other / "a.csv").unlink()
    (other / "a.json").write_text('{\n "text": "x"\n}\n')
    assert read_texts(f"hf:{other}") == ["x"]


def test_links_and_capital_letters_are_read(tmp_path):
    texts = tmp_path / "texts"
    (texts / "real").mkdir(parents=True)
    (texts / "real" / "b.TXT").write_text("b")
    (texts / "a.Txt").write_text("a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("c")
    (texts / "linked").symlink_to(tmp_path / "elsewhere")
    (texts / "again").symlink_to(texts / "real")
    (texts / "loop").symlink_to(tmp_path)
    (texts / "d.txt").symlink_to(tmp_path / "elsewhere" / "c.txt")
    # Each folder once; by which of its names it is entered depends on their order alone.
    assert read_texts(f"text:{texts}") == ["a", "c", "b", "c"]
    (texts / "e.txt").symlink_to(tmp_path / "nowhere")
    assert f"{texts}/e.txt is a link to nothing" in sentence_of(f"text:{texts}")

    table = tmp_path / "tables"
    table.mkdir()
    (table / "A.JSONL").write_text(json_lines({"text": "x"}))
    (table / "B.Part.JSONL.GZ").write_bytes(gzip.compress(json_lines({"text": "y"}).encode()))
    assert read_texts(f"jsonl:{table}/*") == ["x", "y"]
    (table / "a.jsonl").symlink_to(table / "A.JSONL")
    assert read_texts(f"jsonl:{table}/*") == ["x", "y"]
    (table / "a.jsonl").unlink()
    assert read_texts(f"hf:{table}") == ["x", "y"]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "data").symlink_to(table)
    (mixed / "README.md").write_text("---\nconfigs:\n- {config_name: default, data_files: 'data/*.jsonl*'}\n---\n")
    assert read_texts(f"hf:{mixed}") == ["x", "y"]
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["z"]}), parquet / "A.Parquet")
    assert read_texts(f"parquet:{parquet}/*") == read_texts(f"hf:{parquet}") == ["z"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text(json_lines({"text": "y"}))
    assert read_texts("text:~") == ["x"]
    assert read_texts("jsonl:~/*.jsonl,~/a.jsonl") == ["y"]
    (tmp_path / "hf").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "hf" / "a.jsonl")
    assert read_texts("hf:~/hf") == ["y"]
    assert_fails([f"--out {tmp_path}/a.txt"], source="text:~", out="~/a.txt", **SMALL)


def test_a_path_without_its_kind_and_a_name_that_datasets_has_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("x")
    (tmp_path / "a.JSONL").write_text(json_lines({"text": "y"}))
    assert read_texts("text:book.txt") == ["x"]
    assert sentence_of("book.txt").endswith("write it as text:book.txt")
    assert sentence_of("a.JSONL").endswith("write it as jsonl:a.JSONL")
    for folder in ("csv", "json"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.csv").write_text("text\nz\n")
        assert read_texts(f"hf:{folder}") == ["z"]


def test_a_folder_without_rights_is_named(tmp_path, monkeypatch):
    """As another user, since root has all rights."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "closed").mkdir(mode=0)
    (tmp_path / "open" / "a.txt").write_text("x")

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    listed = os.scandir
    monkeypatch.setattr("os.scandir", scandir)
    assert f"{tmp_path}/open/closed cannot be listed (Permission denied)" in sentence_of(f"text:{tmp_path}/open")


def test_what_was_taken_for_text_is_told(tmp_path):
    for data, words in (
        ("text".encode("utf-16"), "UTF-16: convert it with `iconv"),
        (gzip.compress(b"text"), "compressed with gzip"),
        (b"PK\x03\x04\xff", "zip archive"),
    ):
        (tmp_path / "a.txt").write_bytes(data)
        assert words in sentence_of(f"text:{tmp_path}")
        assert words in sentence_of(f"jsonl:{tmp_path}/a.txt")
    assert "is a folder; give its files" in sentence_of(f"jsonl:{tmp_path}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a",}', "line 1 is not JSON"),
        ('{"text": 1' + "0" * 5000 + "}", "line 1 cannot be read"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is nested too deeply"),
        ('["a"]', "line 1 is a JSON list"),
        ('[\n{"text": "a"}\n]', "line 1 begins a JSON array"),
        ('{"text": {"a": 1}}', "line 1 holds dict there"),
        ("{'text': 'a'}", "line 1 is not JSON"),
    ],
)
def test_lines_that_are_no_rows(line, words, tmp_path):
    (tmp_path / "a.jsonl").write_text(line)
    assert f"{tmp_path}/a.jsonl {words}" in sentence_of(f"jsonl:{tmp_path}/a.jsonl")


def test_columns_that_hold_no_text(tmp_path):
    for values in ([{"x": "a"}], [["a"]], [1], [True], [1.5]):
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
        assert "--text-column text" in sentence_of(f"parquet:{tmp_path}/a.parquet")
    for array in (pyarrow.array(["a", None]).dictionary_encode(), pyarrow.array([b"a", b""], pyarrow.large_binary())):
        pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "a.parquet")
        assert read_texts(f"parquet:{tmp_path}/a.parquet") == ["a", ""]


def test_one_document_gives_its_end_for_validation(tmp_path, caplog):
    source = tmp_path / "text"
    source.mkdir()
    book = "".join(TEXTS)
    (source / "book.txt").write_text(book)
    (source / "empty.txt").touch()
    options = SMALL | {"source": f"text:{source}", "out": tmp_path / "out"}
    with caplog.at_level("INFO", logger="data_prep"):
        manifest = prepare(PrepareOptions(**options), quiet=True)
    assert "its last 0.2 is the validation document" in caplog.text
    assert manifest.train.documents == manifest.validation.documents == 1
    assert manifest.train.bytes + manifest.validation.bytes == len(book.encode())
    assert 0.2 <= manifest.validation.bytes / len(book.encode()) < 0.21
    shares = DrawnShares()
    parts = [document.text for _, document in split_documents(PrepareOptions(**options), None, SkipCounts(), shares)]
    assert "".join(parts) == book and parts[0].endswith("\n") and shares.divided


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a b c d", ["a b c ", "d"]),
        ("abcdefghij", ["abcdefgh", "ij"]),
        ("one\ntwo three four", ["one\ntwo three ", "four"]),
        ("a", None),
        ("a   \n  ", None),
    ],
)
def test_where_one_document_is_divided(text, parts, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    options = PrepareOptions(f"text:{tmp_path}", tmp_path / "out", validation_fraction=0.2)
    found = list(split_documents(options, None, SkipCounts()))
    if parts is None:
        assert len(found) == 1
    else:
        assert [(split, document.text) for split, document in found] == list(
            zip(("train", "validation"), parts, strict=True)
        )


@pytest.mark.parametrize("number", [2, 3, 10])
@pytest.mark.parametrize("fraction", [1e-12, 1 - 1e-12])
def test_the_fraction_that_an_error_names_works(number, fraction, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json_lines(*({"text": f"{i} {text}"} for i, text in enumerate(TEXTS[:number]))))
    options = SMALL | {"source": f"jsonl:{file}", "out": tmp_path / "out", "vocab_size": 260}
    with pytest.raises(UserError, match=r"--validation-fraction .* pass (\S+), or") as error:
        prepare(PrepareOptions(**options | {"validation_fraction": fraction}), quiet=True)
    named = float(str(error.value).partition("pass ")[2].partition(",")[0])
    manifest = prepare(PrepareOptions(**options | {"validation_fraction": named}), quiet=True)
    assert manifest.train.documents and manifest.validation.documents
    file.write_text(json_lines({"text": TEXTS[0]}, {"text": TEXTS[0]}))
    same = options | {"out": tmp_path / "x", "validation_fraction": 1e-12}
    assert_fails(["--validation-fraction", "all have the same text", "--validation-source"], **same)


def test_text_without_spaces_trains_a_tokenizer_in_time():
    """Without a limit on the length of a word, a megabyte takes more than five minutes."""
    characters = [chr(0x4E00 + i) for i in range(3000)]
    drawn = random.Random(0)
    words = ["".join(drawn.choices(characters, k=drawn.choice([1, 2, 3]))) for _ in range(20_000)]
    text = "".join(drawn.choices(words, [1 / (i + 1) for i in range(20_000)], k=150_000))
    started = time.process_time()  # of all threads, whatever else the machine does
    tokenizer = train_tokenizer([text], 4096, len(text.encode()))
    assert time.process_time() - started < 60
    pre_tokenizer = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    assert pre_tokenizer["type"] == "ByteLevel" and pre_tokenizer["use_regex"]
    assert tokenizer.decode(tokenizer(text[:1000])["input_ids"]) == text[:1000]
