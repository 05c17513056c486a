"""Shards of one folder: several runs at once, damage, and files that are the only copy."""

import shutil
import subprocess
from pathlib import Path

import pytest
from shards import flip, open_dataset
from streaming_forks import run_in_fork

from infini_ds.streaming_compat.library import World
from infini_ds.streaming_compat.stream import ShardError, ShardStream

DEFAULTS = {"split": "train", "download_retry": 1, "download_timeout": 60, "keep_zip": None, "validate_hash": None}
# A race that plain streaming loses now and then, and ours never.
EXPAND = """
from pathlib import Path
{open_stream}
stream.apply_default(defaults)
shard = stream.get_shards(World.detect(), False)[0]
file = Path(folder, "train", shard.file_pairs[0][0].basename)
result = race(lambda: stream.prepare_shard(shard), before=lambda: file.unlink(missing_ok=True), **how)
"""
FETCH = """
from pathlib import Path
{open_stream}
stream.apply_default(defaults)
file = Path(cache, "train", "shard.00000.mds.zstd")
file.parent.mkdir(parents=True)
result = race(lambda: stream._download_file(file.name), before=lambda: file.unlink(missing_ok=True), **how)
"""
UNTIL_ERROR = {"rounds": 4000, "until_error": True}
OURS = "from infini_ds.streaming_compat.stream import ShardStream\nstream = ShardStream"


def read(folder: Path, remote: Path | None = None) -> list[int]:
    return [int(row["input_ids"][-1]) for row in open_dataset(folder, remote)]


def test_plain_streaming_fails_where_two_runs_expand_one_shard(large):
    code = EXPAND.format(open_stream='stream = Stream(local=folder, split="train")')
    errors = run_in_fork(code, folder=str(large), defaults=DEFAULTS, how=UNTIL_ERROR)
    assert any(error.startswith("FileNotFoundError") for error in errors)


def test_ours_lets_runs_expand_one_shard(large):
    code = EXPAND.format(open_stream=f'{OURS}(local=folder, split="train", remote_folder=None, bounded=False)')
    assert run_in_fork(code, folder=str(large), defaults=DEFAULTS, how={}) == []
    assert sorted(file.name for file in (large / "train").iterdir()) == [
        "index.json",
        "shard.00000.mds",
        "shard.00000.mds.zstd",
    ]


def test_plain_streaming_fails_where_two_runs_fetch_one_file(large, tmp_path):
    code = FETCH.format(open_stream='stream = Stream(local=cache, remote=remote, split="train")')
    errors = run_in_fork(code, remote=str(large), cache=str(tmp_path / "cache"), defaults=DEFAULTS, how=UNTIL_ERROR)
    assert any(error.startswith("FileNotFoundError") for error in errors)


def test_ours_lets_runs_fetch_one_file(large, tmp_path):
    code = FETCH.format(open_stream=f'{OURS}(local=cache, split="train", remote_folder=remote, bounded=False)')
    assert run_in_fork(code, remote=str(large), cache=str(tmp_path / "cache"), defaults=DEFAULTS, how={}) == []


def test_plain_streaming_reads_a_damaged_expanded_shard(folder):
    code = """
    import os

    def read():
        dataset = StreamingDataset(local=folder, split="train", batch_size=2, validate_hash="xxh64")
        return [int(row["input_ids"][-1]) for row in dataset]

    rows, file = read(), os.path.join(folder, "train", "shard.00002.mds")
    data = bytearray(open(file, "rb").read())
    data[-1] ^= 1
    open(file, "wb").write(data)
    result = [a == b for a, b in zip(rows, read())].count(False)
    """
    assert run_in_fork(code, folder=str(folder)) == 1


def test_ours_restores_a_damaged_expanded_shard(folder, capfd):
    assert read(folder) == list(range(300))
    file = folder / "train" / "shard.00002.mds"
    flip(file)
    assert read(folder) == list(range(300))
    assert f"{file} is damaged: restoring it from shard.00002.mds.zstd" in capfd.readouterr().out


def test_plain_streaming_deletes_expanded_shards_without_compressed_ones(folder):
    code = """
    from pathlib import Path

    list(StreamingDataset(local=folder, split="train", batch_size=2))
    for file in Path(folder, "train").glob("*.zstd"):
        file.unlink()
    StreamingDataset(local=folder, split="train", batch_size=2)
    result = len(list(Path(folder, "train").glob("*.mds")))
    """
    assert run_in_fork(code, folder=str(folder)) == 0


def test_ours_reads_expanded_shards_without_compressed_ones(folder):
    read(folder)
    for file in (folder / "train").glob("*.zstd"):
        file.unlink()
    assert read(folder) == list(range(300))


def test_a_shard_that_is_damaged_in_both_forms_is_named(folder, capfd):
    read(folder)
    file = folder / "train" / "shard.00002.mds"
    flip(file)
    flip(folder / "train" / "shard.00002.mds.zstd")
    with pytest.raises(ShardError, match=f"{file}.zstd is damaged, its checksum is not that of index.json"):
        read(folder)
    assert "Traceback" not in capfd.readouterr().err


def test_a_damaged_copy_is_fetched_again_and_a_damaged_origin_is_named(written, folder, tmp_path, capfd):
    cache = tmp_path / "cache"
    (cache / "train").mkdir(parents=True)
    shutil.copy(written / "train" / "index.json", cache / "train")
    assert read(cache, folder) == list(range(300))
    expanded, other = (cache / "train" / f"shard.0000{n}.mds" for n in (1, 3))
    flip(expanded)
    other.unlink()  # a transfer that went wrong
    other.with_name(other.name + ".zstd").write_bytes(b"broken")
    assert read(cache, folder) == list(range(300))
    output = capfd.readouterr().out
    assert f"{expanded} is damaged: restoring it from {folder}" in output
    assert f"{other}.zstd is damaged: restoring it from {folder}" in output
    expanded.unlink()
    flip(folder / "train" / f"{expanded.name}.zstd")
    with pytest.raises(ShardError, match=rf"{expanded} was fetched twice from {folder} with a checksum"):
        read(cache, folder)
    assert "Traceback" not in capfd.readouterr().err


def test_a_missing_shard_is_named(folder):
    (folder / "train" / "shard.00005.mds.zstd").unlink()
    with pytest.raises(ShardError, match=r"shard.00005.mds is missing: copy it again from its origin"):
        read(folder)


def test_a_full_disk_gets_a_sentence(large, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        copy = Path(shutil.copytree(large, disk / "copy"))
        stream = ShardStream(local=str(copy), split="train", remote_folder=None, bounded=False)
        stream.apply_default(DEFAULTS)
        (shard,) = stream.get_shards(World.detect(), False)
        with pytest.raises(
            ShardError, match=r"the disk is too full to expand .*copy/train/shard.*: free some space, or"
        ):
            stream.prepare_shard(shard)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
