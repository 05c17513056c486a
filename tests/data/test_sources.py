"""Prepared data that is found: local and remote, damaged, of several streams, and the same as a run began with."""

import shutil
from pathlib import Path

import pytest
from harness import pretrain
from ranks import SEED, read, sources_of
from shards import flip

from data_prep.prepare import PrepareOptions, prepare
from infini_ds.config.training_data import check_cache_limit, find_sources
from infini_ds.data.cache_limit import PREFETCH_BATCHES
from infini_ds.data.sources import StreamSpec, open_sources
from infini_ds.data.streams import TrainingStream
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.utils.errors import UserError


def open_stream(path, cache="", rows=4, cache_limit=None) -> TrainingStream:
    return TrainingStream(sources_of(path, cache=cache), rows, SEED, 0, cache_limit)


def size(file: Path) -> int:
    """0 for a file that was just deleted: shards are fetched and deleted meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def cached(cache: Path, pattern: str) -> list[Path]:
    return sorted(file for file in cache.rglob(pattern) if "train" in file.parts)


def test_a_damaged_index_is_named(copy):
    index = copy / "validation" / "index.json"
    index.write_text(index.read_text().replace("column_encodings", "column^encodings"))
    with pytest.raises(UserError, match=f"{index} is damaged .*--force"):
        sources_of(copy)
    index.write_text("{")
    with pytest.raises(UserError, match=f"{index} is damaged .*--force"):
        sources_of(copy)
    index.unlink()
    with pytest.raises(UserError, match=f"path={copy} has no validation/index.json: prepare it"):
        sources_of(copy)


def test_remote_shards_through_a_limited_cache(copy, many, tmp_path):
    """A folder read as if it were remote: the same rows, and the cache holds no more than the limit and one shard."""
    cache, remote = tmp_path / "cache", f"file://{copy}"
    expected = read(open_stream(many, rows=2), 100)
    sources = find_sources(remote, [], str(cache))
    shards = sources[0].shards("train")
    largest = max(shard["raw_data"]["bytes"] + shard["zip_data"]["bytes"] for shard in shards)
    limit = 8 * largest
    check_cache_limit(sources, limit, rows_ahead=PREFETCH_BATCHES * 2)
    stream, used = iter(open_stream(remote, cache, rows=2, cache_limit=limit)), []
    for rows in expected:
        assert next(stream).row_numbers == [number for number, _ in rows]
        used.append(sum(map(size, cached(cache, "*.mds*") + cached(cache, "index.json"))))
    assert max(used) <= limit + largest < sum(shard["raw_data"]["bytes"] for shard in shards)
    assert not list(copy.rglob("*.mds"))  # nothing was written there

    with pytest.raises(UserError, match=rf"data.cache_limit={limit} is too little .*: give \d+ or"):
        check_cache_limit(sources, limit, rows_ahead=12)
    with pytest.raises(UserError, match=r"would delete shards of data.path=.*, the only copy: name it file://"):
        check_cache_limit(find_sources(str(copy), [], ""), limit, rows_ahead=6)


def test_a_damaged_shard_in_the_cache_is_fetched_again(copy, many, tmp_path, capfd):
    cache, remote = tmp_path / "cache", f"file://{copy}"
    expected = read(open_stream(many), 20)
    assert read(open_stream(remote, cache), 20) == expected
    expanded = cached(cache, "*.mds")[0]
    flip(expanded)
    assert read(open_stream(remote, cache), 20) == expected
    assert f"{expanded} is damaged: restoring it from {copy}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("s3://bucket/stories", ["data.path=s3://bucket/stories", "boto3", "pip install boto3"]),
        ("gs://bucket/stories", ["pip install 'google-cloud-storage<3.3'"]),
        ("hf://me/stories", ["data.path=hf://me/stories: write it as hf://datasets/OWNER/NAME"]),
        ("ftp://host/stories", ["ftp:// is not known", "s3"]),
        ("file:///nowhere", ["data.path=file:///nowhere", "check the address", "data.cache="]),
        ("/nowhere", ["/nowhere", "python -m data_prep"]),
    ],
)
def test_addresses_that_cannot_be_read(path, words, tmp_path):
    with pytest.raises(UserError) as error:
        find_sources(path, [], str(tmp_path / "cache"))
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_streams_have_to_go_together(many, shards, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"Some text of number {number}. " * 40)
    options = {"sequence_length": 128, "workers": 1, "validation_fraction": 0.5, "out": tmp_path / "other"}
    prepare(PrepareOptions(source=f"text:{text}", tokenizer=str(shards / "tokenizer"), **options), quiet=True)
    with pytest.raises(UserError, match=r"path=.*other has rows of another length .*128, not 256"):
        sources_of(many, tmp_path / "other")
    with pytest.raises(UserError, match=r"stream\[1\]=.* is named twice"):
        sources_of(many, {"path": f"{many}/"})


def test_moved_data_is_the_same_and_other_data_is_refused(many, shards, tmp_path):
    """Data is identified by the checksums of its shards, not by its path: a run resumes with a copy, in the cache."""
    pretrain(many, tmp_path, "run", "steps=2", "schedule.kind=constant", "schedule.warmup_steps=0")
    assert all("data/wait_share" in line for line in read_metrics(tmp_path / "run") if "train/loss" in line)
    copy = f"file://{shutil.copytree(many, tmp_path / 'moved')}"
    more = ["steps=4", "schedule.kind=constant", "schedule.warmup_steps=0", f"data.cache={tmp_path / 'cache'}"]
    pretrain(copy, tmp_path, "run", *more)
    for overrides, words in (
        ([], "was prepared again"),
        ([f"data.streams=[{{path: {many}, proportion: 2}}]", "data.path=data/stdlib"], "proportion=2.0"),
        ([f"data.streams=[{{path: {many}}},{{path: {shards}}}]", "data.path=data/stdlib"], "2 streams"),
    ):
        with pytest.raises(UserError, match=words):
            pretrain(shards, tmp_path, "run", *more, "steps=6", *overrides)


def test_data_that_is_missing_names_its_key(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^data\.path=/nowhere: no such folder of prepared data; make it"):
        find_sources("/nowhere", (), "cache")
    with pytest.raises(UserError, match=rf"^data\.path={tmp_path}: it holds no manifest\.json"):
        find_sources(str(tmp_path), (), "cache")
    with pytest.raises(UserError, match=r"^--data=/nowhere: no such folder"):
        open_sources([StreamSpec("--data", "/nowhere")], "cache", "the cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"^--data=~: it holds no manifest\.json"):
        open_sources([StreamSpec("--data", "~")], "cache", "the cache")
