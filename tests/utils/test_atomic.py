"""Atomic writes and hashes."""

import hashlib
import json
import os
from multiprocessing import get_context

import pytest

from infini_ds.utils.atomic import write_json_atomic, write_text_atomic
from infini_ds.utils.hashing import CHUNK_BYTES, sha256_of_file, sha256_of_json


def test_a_write_replaces_the_content_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    write_text_atomic(path, "earlier")
    write_json_atomic(path, {"loss": 3.25, "name": "größer"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": 3.25, "name": "größer"}
    assert path.read_text().splitlines()[1] == ' "loss": 3.25,'
    assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_file_has_the_permissions_that_open_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text_atomic(tmp_path / "atomic", "")
        (tmp_path / "plain").write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_write_keeps_the_earlier_content(tmp_path):
    path = tmp_path / "results.json"
    write_text_atomic(path, "earlier")
    with pytest.raises(TypeError):
        write_json_atomic(path, {"not JSON": object()})
    with pytest.raises(UnicodeEncodeError):  # while the partial file is open
        write_text_atomic(path, "lone surrogate \ud800")
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["results.json"]


def _write_often(path, text):
    for _ in range(50):
        write_text_atomic(path, text)


def test_writers_of_one_path_do_not_disturb_each_other(tmp_path):
    """A reader finds what one of them wrote, complete, at every time."""
    path, texts = tmp_path / "results.json", {letter * 100_000 for letter in "ab"}
    write_text_atomic(path, min(texts))
    writers = [get_context("fork").Process(target=_write_often, args=(path, text)) for text in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in texts
    assert [writer.exitcode for writer in writers] == [0, 0] and os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 3])
def test_hash_of_a_file(tmp_path, size):
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_hash_of_a_value():
    assert sha256_of_json({"a": 1, "b": [1, 2]}) == sha256_of_json({"b": [1, 2], "a": 1})
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": 2})
    assert sha256_of_json({"a": 1}) == hashlib.sha256(b'{"a": 1}').hexdigest()  # results on the disk are found by it
