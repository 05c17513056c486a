"""The folder that is written: complete or absent, and never the user's own; and the sentences for mistakes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import ROOT
from preparing import SMALL, assert_fails, command

from data_prep.__main__ import parse
from data_prep.atomic_dir import LOCK
from data_prep.prepare import PrepareOptions, load_manifest, prepare
from infini_ds.utils.errors import UserError


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
    assert_fails(words, **{"source": f"text:{folder}", "out": tmp_path / "out", **SMALL} | changes)
    assert os.listdir(tmp_path) == []


def test_a_split_without_documents_is_named(folder, tmp_path, prepared):
    (tmp_path / "empty").mkdir()
    options = SMALL | {"tokenizer": str(prepared / "tokenizer"), "out": tmp_path / "out"}
    empty, full = f"text:{tmp_path / 'empty'}", f"text:{folder}"
    assert_fails(["--source", "no .txt file is in that folder"], **options | {"source": empty})
    (tmp_path / "empty" / "a.txt").write_text(" \n")
    assert_fails(["--source", "no documents (1 empty"], **options | {"source": empty})
    options["source"] = full
    assert_fails(["no document is left to train on", "60 also in"], **options | {"validation_source": full})
    assert_fails(["--validation-source", "no documents"], **options | {"validation_source": empty})


def test_a_finished_folder_is_left_alone_and_never_the_users(folder, tmp_path, capsys):
    options = SMALL | {"source": f"text:{folder}", "out": tmp_path / "out"}
    prepare(PrepareOptions(**options))
    assert "bytes a token" in capsys.readouterr().out
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    prepare(PrepareOptions(**options | {"workers": 2}))
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    assert_fails(["--out", "--vocab-size 400 there, 300 here", "--force"], **options | {"vocab_size": 300})
    assert_fails(["--subset not given there, x here"], **options | {"source": f"hf:{folder}", "subset": "x"})
    (tmp_path / "out" / "notes").write_text("mine")
    assert_fails(["--force", "notes"], **options | {"vocab_size": 300, "force": True})
    (tmp_path / "out" / "notes").unlink()
    assert (
        prepare(PrepareOptions(**options | {"vocab_size": 300, "force": True}), quiet=True).tokenizer.vocab_size == 300
    )
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("mine")
    assert_fails(["--out", "name another"], **options | {"out": tmp_path / "mine", "force": True})
    assert_fails(["--out /proc/mine: no folder can be made there", "name another"], **options | {"out": "/proc/mine"})
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
    run.communicate(timeout=120)
    assert not out.exists()
    if number == signal.SIGTERM:
        assert run.returncode == 143 and os.listdir(tmp_path) == []
    else:
        (abandoned,) = tmp_path.iterdir()
        assert (abandoned / LOCK).exists() and not (abandoned / "manifest.json").exists()
    until = time.monotonic() + 120
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
    assert_fails(["--out", "the disk is full", "free some space"], **options | {"out": small_disk / "out"})
    assert os.listdir(small_disk) == (["other"] if filled else [])


def test_command_line():
    options = parse(["--source", "stdlib", "--out", "x", "--shard-bytes", "1MiB", "--tokenizer-bytes", "3k", "--force"])
    assert options == PrepareOptions("stdlib", "x", shard_bytes=1 << 20, tokenizer_bytes=3072, force=True)
    for arguments, words in (
        (["--source", "stdlib", "--out", "x", "--sequence-lenth", "8"], "did you mean --sequence-length?"),
        (["--source", "jsnl:x", "--out", "x"], "did you mean jsonl:FILES?"),
    ):
        done = subprocess.run(command(*arguments), check=False, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_the_stack_of_a_mistake_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("INFINI_DS_TRACEBACK", "1")
    done = subprocess.run(command("--source", "text:/nowhere", "--out", "x"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("data_prep: --source text:/nowhere: no such folder")


def test_rows_import_little():
    code = "import data_prep.packing, sys; assert not {'streaming', 'transformers', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
