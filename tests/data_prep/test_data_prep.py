"""Prepared data against the documents it was made from, on real text: this Python's own library and its help topics."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from shards import read_rows, read_token_documents
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_prep.__main__ import parse
from data_prep.atomic_dir import LOCK
from data_prep.packing import Packer, decode_row, token_dtype
from data_prep.prepare import PrepareOptions, load_manifest, prepare
from data_prep.sources import ReadOptions, read_documents
from data_prep.splits import digest
from data_prep.text_chunks import cut, may_cut
from infini_ds.streaming_compat.library import StreamingDataset
from infini_ds.utils.errors import UserError

ROOT = Path(__file__).parent.parent
TEXTS = [topics[name] for name in sorted(topics)[:60]]
SMALL = {"vocab_size": 400, "sequence_length": 128, "workers": 1, "validation_fraction": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 documents as .txt files in two folders, named so that their order is that of TEXTS."""
    root = tmp_path_factory.mktemp("texts")
    for index, text in enumerate(TEXTS):
        path = root / f"{index // 40}" / f"{index:03}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    return root


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(PrepareOptions(source=f"text:{folder}", out=out, **SMALL), quiet=True)
    return out


def reading(source, **changes):
    settings = {"text_column": "text", "split": "train", "subset": None, "bad_utf8": "error"}
    settings = settings | {"document_separator": None} | changes
    return ReadOptions("--source", source, **settings)


def read_texts(source, **changes):
    return [document.text for document in read_documents(reading(source, **changes))]


def split_files(out):
    """What a run made, without its manifest and without what a reader expanded."""
    return {p.relative_to(out): p.read_bytes() for p in Path(out).rglob("*") if p.suffix in (".zstd", ".json")} | {
        Path("manifest.json"): b""
    }


def fails(words, **options):
    with pytest.raises(UserError) as error:
        prepare(PrepareOptions(**options), quiet=True)
    sentence = str(error.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


def command(*arguments):
    return [sys.executable, "-m", "data_prep", *map(str, arguments)]


# Sources


def test_stdlib_is_sorted_deterministic_and_survives_broken_files():
    first = list(read_documents(reading("stdlib")))
    names = [document.name for document in first]
    assert names[0].startswith("pydoc topic") and "argparse.py" in names
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert any(document.text is None for document in first)
    assert first == list(read_documents(reading("stdlib")))


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
    fails(["--source", "--split test"], **options | {"out": tmp_path / "x", "split": "test"})


def test_null_column_counts_as_empty_and_half_a_surrogate_as_bad_utf8(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": null}\n\n{"text": "a\\ud800b"}\n')
    assert read_texts(f"jsonl:{file}", bad_utf8="skip") == ["", None]
    assert read_texts(f"jsonl:{file}", bad_utf8="replace") == ["", "a\ufffd\ufffd\ufffdb"]
    with pytest.raises(UserError, match="line 3 is not UTF-8 at byte 1"):
        read_texts(f"jsonl:{file}")


# Rows


def test_dtype_rule():
    assert [token_dtype(size) for size in (2, 65536, 65537)] == ["uint16", "uint16", "uint32"]


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
        texts = [text for text in TEXTS if (digest(text) < bound) == (split == "validation")]
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


def test_cut_pieces_give_the_same_tokens(prepared, monkeypatch):
    monkeypatch.setattr("data_prep.text_chunks.PIECE", 50)
    spec = (prepared / "tokenizer" / "tokenizer.json").read_text()
    tokenizer = Tokenizer.from_str(spec)
    text = "".join(TEXTS) + " \n\n x\u00a0 \x1c y\u2028 z  "
    pieces = list(cut(text))
    assert may_cut(spec) and len(pieces) > 1000 and "".join(pieces) == text
    assert [token for piece in pieces for token in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids
    assert not may_cut(spec.replace('"normalizer": null', '"normalizer": {"type": "NFC"}'))


def test_workers_do_not_change_the_result_of_long_documents(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    for index, repeat in enumerate((1, 4, 1, 1)):  # 700 kB each time: one document runs through several batches
        (source / f"{index}.txt").write_text(f"{index} " + "".join(topics.values()) * repeat)
    options = SMALL | {"source": f"text:{source}", "tokenizer_bytes": 200_000, "shard_bytes": 1 << 20}
    options["validation_fraction"] = 0.4
    for workers in (1, 2):
        prepare(PrepareOptions(**options | {"out": tmp_path / f"{workers}", "workers": workers}), quiet=True)
    one, two = split_files(tmp_path / "1"), split_files(tmp_path / "2")
    assert one == two and sum(path.suffix == ".zstd" for path in one) > 4


# Splits


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


def test_document_separator_divides_files(tmp_path):
    """Files as TinyStories' are: documents between lines of <|endoftext|>, at the start and end of a file too."""
    (tmp_path / "a.txt").write_text("Once.\n\nThe end.\n<|endoftext|>\n\nTwice <|endoftext|> here.\n<|endoftext|>\r\n")
    (tmp_path / "b.txt").write_bytes(b"<|endoftext|>\nThrice\n<|endoftext|>\nbad \xff")
    found = list(read_documents(reading(f"text:{tmp_path}", document_separator="<|endoftext|>", bad_utf8="skip")))
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


def test_a_text_that_spells_the_end_token_does_not_end(tmp_path, prepared):
    for index in range(4):
        (tmp_path / f"{index}.txt").write_text(f"{index} once<|endoftext|>upon")
    out = tmp_path / "out"
    options = SMALL | {"validation_fraction": 0.5, "tokenizer": str(prepared / "tokenizer")}
    manifest = prepare(PrepareOptions(source=f"text:{tmp_path}", out=out, **options), quiet=True)
    documents = [ids for split in ("train", "validation") for ids in read_token_documents(out / split, 0)]
    assert len(documents) == 4 and all(ids.count(0) == 1 for ids in documents) and manifest.tokenizer.kind == "loaded"


# Tokenizers of others


@pytest.mark.parametrize("files", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_gpt2_style_folder_without_tokenizer_config(prepared, folder, tmp_path, files):
    """As GPT-2 was published: `<|endoftext|>` only in the vocabulary, merges.txt without a version line."""
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    spec = json.loads((prepared / "tokenizer" / "tokenizer.json").read_text())
    if "vocab.json" in files:
        (gpt2 / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
        (gpt2 / "merges.txt").write_text("".join(" ".join(pair) + "\n" for pair in spec["model"]["merges"]))
    else:
        spec["truncation"] = {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
        (gpt2 / "tokenizer.json").write_text(json.dumps(spec))
    options = SMALL | {"source": f"text:{folder}", "tokenizer": str(gpt2), "out": tmp_path / "out"}
    manifest = prepare(PrepareOptions(**options), quiet=True)
    assert manifest.train == load_manifest(prepared).train and manifest.tokenizer.start_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").eos_token == "<|endoftext|>"


def test_tokenizers_that_cannot_serve(folder, tmp_path, prepared):
    options = SMALL | {"source": f"text:{folder}", "out": tmp_path / "out"}
    (tmp_path / "empty").mkdir()
    fails(["--tokenizer", "neither tokenizer.json"], **options | {"tokenizer": str(tmp_path / "empty")})
    fails(
        ["--tokenizer", "no tokenizer of that name"],
        **options | {"tokenizer": str(tmp_path / "none" / "such" / "x")},
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    spec = (prepared / "tokenizer" / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (bare / "tokenizer.json").write_text(spec)
    fails(["--tokenizer", "no token begins or ends"], **options | {"tokenizer": str(bare)})
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    fails(["--tokenizer", "no token begins or ends"], **options | {"tokenizer": str(bare)})
    fails(["--vocab-size 90000", "ask for"], **options | {"vocab_size": 90000})
    assert os.listdir(tmp_path) and not (tmp_path / "out").exists()


# What the user can mend


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "texts:x"}, ["--source texts:x", "did you mean text:FOLDER"]),
        ({"source": "text:/no/such"}, ["--source text:/no/such", "no such folder"]),
        ({"source": "text"}, ["text:FOLDER"]),
        ({"source": "jsonl:/no/*.jsonl"}, ["--source", "matches no file"]),
        ({"validation_source": "parquet:/no.parquet"}, ["--validation-source", "matches no file"]),
        ({"sequence_length": 1}, ["--sequence-length 1"]),
        ({"shard_bytes": 100}, ["--shard-bytes 100"]),
        ({"vocab_size": 257}, ["--vocab-size 257", "258"]),
        ({"validation_fraction": 0.0}, ["--validation-fraction 0.0"]),
        ({"validation_fraction": 1e-9}, ["--validation-fraction", "none of the 60 documents"]),
        ({"validation_split": "test"}, ["--validation-split test", "hf:NAME"]),
        ({"workers": 0}, ["--workers 0"]),
        ({"bad_utf8": "ignore"}, ["--bad-utf8 ignore", "replace"]),
    ],
)
def test_error_sentences(folder, tmp_path, changes, words):
    fails(words, **{"source": f"text:{folder}", "out": tmp_path / "out", **SMALL} | changes)
    assert os.listdir(tmp_path) == []


def test_no_documents_no_training_documents_no_validation_documents(folder, tmp_path, prepared):
    (tmp_path / "empty").mkdir()
    fails(["--source", "no .txt file is in that folder"], source=f"text:{tmp_path / 'empty'}", out=tmp_path / "out")
    (tmp_path / "empty" / "a.txt").write_text(" \n")
    options = SMALL | {"tokenizer": str(prepared / "tokenizer"), "out": tmp_path / "out"}
    empty, full = f"text:{tmp_path / 'empty'}", f"text:{folder}"
    fails(["--source", "no document (1 empty"], **options | {"source": empty})
    fails(["no document is left to train on", "60 also in"], **options | {"source": full, "validation_source": full})
    fails(["--validation-source", "no document"], **options | {"source": full, "validation_source": empty})


def test_bad_utf8_and_missing_columns(folder, tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    for index, text in enumerate(TEXTS[:30]):
        (source / f"{index:02}.txt").write_text(text)
    (source / "07.txt").write_bytes(b"caf\xe9 au lait")
    options = SMALL | {"source": f"text:{source}", "out": tmp_path / "out"}
    fails(["--bad-utf8", "07.txt", "byte 3", "replace or skip"], **options)
    manifest = prepare(PrepareOptions(**options | {"bad_utf8": "skip"}), quiet=True)
    assert manifest.skipped.undecodable == 1 and manifest.train.documents + manifest.validation.documents == 29
    manifest = prepare(PrepareOptions(**options | {"bad_utf8": "replace", "force": True}), quiet=True)
    assert manifest.skipped.repaired == 1 and manifest.train.documents + manifest.validation.documents == 30
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": [1] * 60}), tmp_path / "a.parquet")
    options = options | {"source": f"parquet:{tmp_path}/a.parquet", "out": tmp_path / "x"}
    fails(["--text-column text", "body, n"], **options)
    fails(["--text-column n", "int64"], **options | {"text_column": "n"})


# The folder


def test_a_finished_folder_is_left_alone_and_never_the_users(folder, tmp_path, capsys):
    options = SMALL | {"source": f"text:{folder}", "out": tmp_path / "out"}
    prepare(PrepareOptions(**options))
    assert "bytes a token" in capsys.readouterr().out
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    prepare(PrepareOptions(**options | {"workers": 2}))
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    fails(["--out", "--vocab-size 400 there, 300 here", "--force"], **options | {"vocab_size": 300})
    (tmp_path / "out" / "notes").write_text("mine")
    fails(["--force", "notes"], **options | {"vocab_size": 300, "force": True})
    (tmp_path / "out" / "notes").unlink()
    assert (
        prepare(PrepareOptions(**options | {"vocab_size": 300, "force": True}), quiet=True).tokenizer.vocab_size == 300
    )
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("mine")
    fails(["--out", "name another"], **options | {"out": tmp_path / "mine", "force": True})
    assert (tmp_path / "mine" / "thesis").read_text() == "mine"


def test_load_manifest_wants_a_finished_folder(tmp_path, prepared):
    with pytest.raises(UserError, match="no such folder"):
        load_manifest(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text((prepared / "manifest.json").read_text()[:100])
    with pytest.raises(UserError, match="damaged"):
        load_manifest(tmp_path)
    assert load_manifest(prepared).options["source"].startswith("text:")


def alive(session):
    """Processes of a session that are more than an entry in the table."""
    states = (
        path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()
    )
    return [fields for fields in states if int(fields[3]) == session and fields[0] != "Z"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_nothing_finished_and_a_rerun_succeeds(folder, prepared, tmp_path, number):
    out = tmp_path / "out"
    tokenizer = ("--tokenizer", prepared / "tokenizer", "--workers", 1, "--validation-fraction", 0.2)
    run = subprocess.Popen(
        command("--source", "stdlib", "--out", out, *tokenizer),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=ROOT,
    )
    for line in run.stderr:
        if line.strip() == "tokenizing":
            break
    time.sleep(1)
    run.send_signal(number)
    run.communicate(timeout=30)
    assert not out.exists()
    if number == signal.SIGTERM:
        assert run.returncode == 143 and os.listdir(tmp_path) == []
    else:
        (abandoned,) = tmp_path.iterdir()
        assert (abandoned / LOCK).exists() and not (abandoned / "manifest.json").exists()
    until = time.monotonic() + 20
    while alive(run.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(run.pid)
    options = SMALL | {"source": f"text:{folder}", "out": out, "tokenizer": str(prepared / "tokenizer")}
    prepare(PrepareOptions(**options), quiet=True)
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("filled", [0, 280_000])
def test_disk_full(small_disk, folder, filled, prepared):
    """With 0 bytes taken a shard does not fit, with 280,000 the tokenizer does not."""
    if filled:
        (small_disk / "other").write_bytes(bytes(filled))
    options = SMALL | {"source": f"text:{folder}", "shard_bytes": 100_000, "tokenizer": str(prepared / "tokenizer")}
    options["source"] = "stdlib" if not filled else options["source"]
    fails(["--out", "the disk is full", "free some space"], **options | {"out": small_disk / "out"})
    assert os.listdir(small_disk) == (["other"] if filled else [])


# The command


def test_command_line():
    options = parse(["--source", "stdlib", "--out", "x", "--shard-bytes", "1MiB", "--tokenizer-bytes", "3k", "--force"])
    assert options == PrepareOptions("stdlib", "x", shard_bytes=1 << 20, tokenizer_bytes=3072, force=True)
    for arguments, words in (
        (["--source", "stdlib", "--out", "x", "--sequence-lenth", "8"], "did you mean --sequence-length?"),
        (["--source", "jsnl:x", "--out", "x"], "did you mean jsonl:FILES?"),
    ):
        done = subprocess.run(command(*arguments), check=False, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_rows_and_the_door_import_little_and_quietly():
    code = "import data_prep.packing, sys; assert not {'streaming', 'transformers', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    code = "import infini_ds.streaming_compat.library"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("", "")
