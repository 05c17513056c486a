"""Data: the same rows for any ranks, workers and stops; damaged and far-away shards; what killed runs leave behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from harness import ROOT, environment, pretrain
from infini_ds.streaming_compat.shards import ShardStream, is_whole
from infini_ds.streaming_compat.shared_memory import SHM, find_kept, one_start_at_a_time, remove_stale
from ranks import choose, read

from data_prep.prepare import PrepareOptions, prepare
from infini_ds.data.sources import check_cache_limit, find_sources
from infini_ds.data.streams import AHEAD, TrainingStream, ValidationRows
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.utils.errors import UserError

RANKS = ROOT / "tests" / "support" / "ranks.py"


@pytest.fixture(scope="module")
def many(corpus, shards, tmp_path_factory) -> Path:
    """Some of the corpus in many small shards, with the tokenizer of `shards`."""
    folder = tmp_path_factory.mktemp("some")
    for file in sorted(corpus.glob("[a-h]*.txt")):
        shutil.copy(file, folder)
    out = tmp_path_factory.mktemp("many") / "many"
    options = {"tokenizer": str(shards / "tokenizer"), "sequence_length": 256, "workers": 1, "shard_bytes": 6_000}
    prepare(PrepareOptions(source=f"text:{folder}", out=out, validation_fraction=0.3, **options), quiet=True)
    return out


@pytest.fixture
def copy(many, tmp_path) -> Path:
    """`many` without the shards that were expanded, to damage it."""
    return Path(shutil.copytree(many, tmp_path / "copy", ignore=shutil.ignore_patterns("*.mds")))


def open_stream(path, rows=4, workers=0, cache="", cache_limit=None) -> TrainingStream:
    return TrainingStream(find_sources(str(path), [], str(cache)), rows, 3, workers, cache_limit)


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_rows_do_not_depend_on_ranks_workers_or_stops(many, shards, tmp_path):
    """Two streams in the proportion 3 : 1. What one rank sees in two epochs, two ranks see too, whole or from any stop,
    with and without workers; and one rank goes on where two have stopped.
    """
    streams, rows = [{"path": str(many), "proportion": 3}, {"path": str(shards), "proportion": 1}], 16

    def alone(state, workers, count):
        stream = TrainingStream(find_sources("", choose(*streams), ""), rows, 3, workers)
        if state:
            stream.load_state_dict(state)
        return read(stream, count), stream.state_dict()

    per_epoch = sum(len(read_rows(path)) for path in (many, shards)) // rows
    total = 2 * per_epoch + 3
    whole, _ = alone(None, 0, total)
    assert alone(None, 2, total)[0] == whole
    stops = (1, per_epoch - 1, per_epoch, per_epoch + 1)
    states = {stop: alone(None, 0, stop)[1] for stop in stops}
    for stop, state in states.items():
        assert alone(state, 2 * (stop % 2), 4)[0] == whole[stop : stop + 4], stop

    jobs = [(None, 0, total), *((state, 2 * (stop % 2), 4) for stop, state in states.items())]
    together = run_ranks(tmp_path, [str(tmp_path), streams, rows, jobs])
    for (_, _, count), first, seen in zip(jobs, (0, *stops), together, strict=True):
        batches = [sorted(map(tuple, a + b)) for a, b in zip(*(batches for batches, _ in seen), strict=True)]
        assert batches == [sorted(batch) for batch in whole[first : first + count]], first
        state = seen[0][1]
        after = first + count
        if after < total:
            assert alone(state, 0, 1)[0] == whole[after : after + 1]

    first_epoch = [number for batch in whole[:per_epoch] for number, _ in batch]
    of_first = sum(number < len(read_rows(many)) for number in first_epoch) / len(first_epoch)
    assert abs(of_first - 0.75) < 0.02
    assert [number for batch in whole[per_epoch : 2 * per_epoch] for number, _ in batch] != first_epoch


def read_rows(folder: Path) -> range:
    return range(json.loads((folder / "manifest.json").read_text())["train"]["rows"])


def run_ranks(folder: Path, job: list) -> list:
    """Two ranks that read; for each job what each rank saw and its state."""
    port = str(20_000 + os.getpid() % 20_000)
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def start(place):
        return subprocess.run(
            [sys.executable, RANKS, "read"],
            input=json.dumps(job),
            env=environment(**shared, **place),
            text=True,
            capture_output=True,
            timeout=120,
        )

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(start, places):
            assert done.returncode == 0, done.stderr
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return list(zip(*ranks, strict=True))


def test_nothing_stays_open_of_data_that_were_left(many):
    """Begun and dropped in the middle, as by a run that goes back: no segment, file or thread of it stays."""

    def kept() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def leave_behind() -> None:
        read(open_stream(many), 3)
        ValidationRows(find_sources(str(many), [], ""))[0]

    leave_behind()
    before, deadline = kept(), time.monotonic() + 60
    for _ in range(5):
        leave_behind()
    while any(now > then for now, then in zip(kept(), before, strict=True)):
        assert time.monotonic() < deadline, f"{before} open files and threads became {kept()}"
        time.sleep(0.02)  # threads look every few milliseconds whether to end


def test_an_epoch_takes_each_row_once_and_repeat_more(many, shards):
    n = len(read_rows(many))
    per_epoch = n // 4
    epoch = [number for batch in read(open_stream(many), per_epoch) for number, _ in batch]
    assert len(set(epoch)) == len(epoch) == 4 * per_epoch
    sources = find_sources("", choose({"path": str(many), "repeat": 2}, {"path": str(shards)}), "")
    stream = TrainingStream(sources, 4, 3, 0)
    of_epoch = 2 * n + len(read_rows(shards))
    seen = Counter(number for batch in read(stream, of_epoch // 4) for number, _ in batch)
    assert (
        sum(2 - seen[number] for number in range(n)) + sum(1 - seen[n + i] for i in read_rows(shards)) == of_epoch % 4
    )
    assert max(seen.values()) == 2 and max(seen[n + i] for i in read_rows(shards)) == 1


def test_validation_rows_come_from_each_source_in_turn(many, shards):
    both = ValidationRows(find_sources("", choose({"path": str(many)}, {"path": str(shards)}), ""))
    first, second = (ValidationRows(find_sources(str(path), [], "")) for path in (many, shards))
    assert len(both) == len(first) + len(second)
    for i, (rows, j) in enumerate([(first, 0), (second, 0), (first, 1), (second, 1)]):
        assert (both[i]["input_ids"] == rows[j]["input_ids"]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_shard_is_made_anew_or_named(workers, copy, capfd):
    """A bit flipped in an expanded shard: it is made anew from the compressed one. In both: a sentence and no stack."""
    whole = read(open_stream(copy), 20)
    expanded = sorted((copy / "train").glob("*.mds"))[1]
    flip(expanded)
    assert read(open_stream(copy, workers=workers), 20) == whole
    assert f"{expanded} is damaged: it is made anew from {expanded.name}.zstd" in capfd.readouterr().err

    flip(expanded)
    flip(expanded.with_name(expanded.name + ".zstd"))
    with pytest.raises(UserError) as error:
        read(open_stream(copy, workers=workers), 20)
    assert str(error.value).startswith(f"{expanded}.zstd is damaged: its hash is not what index.json names.")
    assert "Traceback" not in capfd.readouterr().err


def test_damaged_validation_shard_is_named(copy):
    flip(copy / "validation" / "shard.00000.mds.zstd")
    with pytest.raises(UserError, match=r"validation/shard.00000.mds.zstd is damaged"):
        list(ValidationRows(find_sources(str(copy), [], "")).batches(4, None))


def test_missing_shard_and_damaged_index_are_named(copy):
    gone = copy / "train" / "shard.00000.mds"
    for file in (copy / "train").glob(f"{gone.name}*"):
        file.unlink()
    with pytest.raises(UserError, match=f"{gone} is missing: copy it again"):
        read(open_stream(copy), 20)
    index = copy / "validation" / "index.json"
    index.write_text(index.read_text().replace("column_encodings", "column^encodings"))
    with pytest.raises(UserError, match=f"{index} is damaged .*--force"):
        open_stream(copy)
    index.write_text("{")
    with pytest.raises(UserError, match=f"{index} is damaged .*--force"):
        open_stream(copy)


def test_expanded_shards_without_compressed_ones_stay(copy):
    """streaming by itself deletes them, the only copy, as it starts."""
    whole = read(open_stream(copy), 20)
    for file in (copy / "train").glob("*.zstd"):
        file.unlink()
    assert read(open_stream(copy), 20) == whole


def expand(stream, shard, rounds, barrier) -> None:
    raw, _ = shard.file_pairs[0]
    file = Path(stream.local, stream.split, raw.basename)
    for _ in range(rounds):
        barrier.wait()
        file.unlink(missing_ok=True)
        barrier.wait()
        stream.prepare_shard(shard)
        assert is_whole(file, raw.bytes, raw.hashes)


def test_runs_that_expand_one_shard_at_once_do_not_collide(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shared")
    stream = ShardStream(local=str(folder), split="train", far=None, bounded=False)
    stream.apply_default(
        {"split": "train", "download_retry": 0, "download_timeout": 60, "keep_zip": False, "validate_hash": None}
    )
    shard = TrainingStream(find_sources(str(folder), [], ""), 4, 0, 0).dataset.shards[0]
    fork = get_context("fork")
    barrier = fork.Barrier(4)
    runs = [fork.Process(target=expand, args=(stream, shard, 25, barrier)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0] * 4
    assert not list(folder.rglob("*unfinished*")) and not list(folder.rglob("*.tmp"))


def test_no_room_to_expand_gets_a_sentence(many, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        copy = shutil.copytree(many, small / "copy", ignore=shutil.ignore_patterns("*.mds"))
        with open(small / "filler", "wb") as filler:
            filler.write(b"\0" * (shutil.disk_usage(small).free - 20_000))
        with pytest.raises(UserError, match=r"no room to expand .*copy/train/shard.*: make room, or read"):
            read(open_stream(copy), 200)
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def size(file: Path) -> int:
    """0 for a file that has just gone: shards are fetched and deleted meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def cached(cache: Path, pattern: str) -> list[Path]:
    return sorted(file for file in cache.rglob(pattern) if "train" in file.parts)


def test_remote_shards_through_a_bounded_cache(copy, many, tmp_path):
    """A folder read as if it were far away: the same rows; no more than the limit lies in the cache, and a shard that
    is just being fetched."""
    cache, remote = tmp_path / "cache", f"file://{copy}"
    whole = read(open_stream(many, rows=2), 100)
    sources = find_sources(remote, [], str(cache))
    shards = sources[0].shards("train")
    largest = max(shard["raw_data"]["bytes"] + shard["zip_data"]["bytes"] for shard in shards)
    limit = 8 * largest
    check_cache_limit(sources, limit, rows_ahead=AHEAD * 2)
    stream, used = iter(open_stream(remote, rows=2, cache=cache, cache_limit=limit)), []
    for expected in whole:
        batch = next(stream)
        assert batch.row_numbers == [number for number, _ in expected]
        used.append(sum(map(size, cached(cache, "*.mds*") + cached(cache, "index.json"))))
    assert max(used) <= limit + largest < sum(shard["raw_data"]["bytes"] for shard in shards)
    assert not list(copy.rglob("*.mds"))  # nothing was written there

    with pytest.raises(UserError, match=rf"data.cache_limit={limit} is too little .*: give \d+ or"):
        check_cache_limit(sources, limit, rows_ahead=12)
    with pytest.raises(UserError, match=r"would delete shards of data.path=.*, the only copy: name it file://"):
        check_cache_limit(find_sources(str(copy), [], ""), limit, rows_ahead=6)


def test_damaged_copy_is_fetched_again_and_damaged_remote_is_named(copy, many, tmp_path, capfd):
    cache, remote = tmp_path / "cache", f"file://{copy}"
    whole = read(open_stream(many), 20)
    assert read(open_stream(remote, cache=cache), 20) == whole
    kept, other = cached(cache, "*.mds")[:2]
    flip(kept)  # what was expanded
    other.unlink()  # a transfer that went wrong
    other.with_name(other.name + ".zstd").write_bytes(b"broken")
    assert read(open_stream(remote, cache=cache), 20) == whole
    error = capfd.readouterr().err
    assert f"{kept} is damaged: it is made anew from {copy}" in error
    assert f"{other}.zstd is damaged: it is made anew from {copy}" in error

    kept.unlink()
    flip(copy / "train" / f"{kept.name}.zstd")
    with pytest.raises(UserError, match=rf"{kept.name} was fetched twice from {copy} and has another hash"):
        read(open_stream(remote, cache=cache), 20)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("s3://bucket/stories", ["data.path=s3://bucket/stories", "boto3", "pip install boto3"]),
        ("gs://bucket/stories", ["pip install 'google-cloud-storage<3.3'"]),
        ("hf://me/stories", ["data.path=hf://me/stories: write it as hf://datasets/OWNER/NAME"]),
        ("ftp://host/stories", ["ftp:// is not known", "s3"]),
        ("file:///nowhere", ["data.path=file:///nowhere", "check the address"]),
        ("/nowhere", ["/nowhere", "python -m data_prep"]),
    ],
)
def test_addresses_that_cannot_be_read(path, words, tmp_path):
    with pytest.raises(UserError) as error:
        find_sources(path, [], str(tmp_path / "cache"))
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_sources_have_to_go_together(many, shards, tmp_path):
    prepare(
        PrepareOptions(source=f"text:{make_text(tmp_path)}", out=tmp_path / "other", sequence_length=128, workers=1,
                       tokenizer=str(shards / "tokenizer"), validation_fraction=0.5),
        quiet=True,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"data.streams\[1\].path=.*other has rows of another length .*128, not 256"):
        find_sources("", choose({"path": str(many)}, {"path": str(tmp_path / "other")}), "")
    with pytest.raises(UserError, match=r"data.streams\[1\].path=.* is there twice"):
        find_sources("", choose({"path": str(many)}, {"path": f"{many}/"}), "")


def make_text(folder: Path) -> Path:
    (folder / "text").mkdir()
    for number in range(12):
        (folder / "text" / f"{number}.txt").write_text(f"Some text of number {number}. " * 40)
    return folder / "text"


def test_moved_data_go_on_and_other_data_are_refused(many, shards, tmp_path):
    """What tells data are the hashes of their shards, not their path: a run goes on from a copy, through the cache."""
    pretrain(many, tmp_path, "run", "steps=2", "schedule.kind=constant", "schedule.warmup_steps=0")
    assert all("data/wait_share" in line for line in read_metrics(tmp_path / "run") if "train/loss" in line)
    copy = f"file://{shutil.copytree(many, tmp_path / 'moved')}"
    more = ["steps=4", "schedule.kind=constant", "schedule.warmup_steps=0", f"data.cache={tmp_path / 'cache'}"]
    pretrain(copy, tmp_path, "run", *more)
    for overrides, words in (
        ([], "have been made anew"),
        ([f"data.streams=[{{path: {many}, proportion: 2}}]", "data.path=data/stdlib"], "proportion=2.0"),
        ([f"data.streams=[{{path: {many}}},{{path: {shards}}}]", "data.path=data/stdlib"], "2 streams"),
    ):
        with pytest.raises(UserError, match=words):
            pretrain(shards, tmp_path, "run", *more, "steps=6", *overrides)


def test_nothing_is_removed_while_a_run_starts():
    """What it has made, but does not hold yet, looks like a dead run's from another container."""
    code = "from infini_ds.streaming_compat.shared_memory import remove_stale; print(flush=True); remove_stale()"
    with one_start_at_a_time(first_on_node=True):
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
        other.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1)
    assert other.wait(30) == 0


def inode(number: int) -> int | None:
    """What a dataset is told by here: its number may be taken by another run as soon as it is free."""
    file = SHM / f"{number:06}_locals"
    return file.stat().st_ino if file.exists() else None


def test_what_killed_runs_leave_is_removed_and_living_ones_are_not(many):
    """Three processes: one of ours that is killed with all that belongs to it, one of ours and one of plain streaming
    that live. The second is told by its lock alone where its process cannot be seen, as from another container.
    """

    def start(kind):
        command = [sys.executable, RANKS, "hold", many, kind]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        return subprocess.Popen(command, env=environment(), start_new_session=True, **options)

    processes = []
    try:
        numbers = []
        for kind in ("ours", "ours", "plain"):  # one after another: plain streaming cannot start beside another
            processes.append(start(kind))
            numbers.append(int(processes[-1].stdout.readline()))
        dead, ours, plain = numbers
        inodes = [inode(number) for number in numbers]
        os.killpg(processes[0].pid, signal.SIGKILL)
        processes[0].wait()
        remove_stale()
        left = {kept.number: kept for kept in find_kept()}
        assert inode(dead) != inodes[0] and left[ours].living and left[plain].living
        assert [inode(ours), inode(plain)] == inodes[1:]

        code = "from infini_ds.streaming_compat.shared_memory import remove_stale; print([kept.number for kept in remove_stale()])"
        unseen = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
        os.killpg(processes[2].pid, signal.SIGKILL)  # it holds no lock, so it would count as dead there
        processes[2].wait()
        done = subprocess.run(unseen, capture_output=True, text=True, env=environment(), cwd=ROOT)
        if done.returncode == 0:  # else a new process namespace was not permitted
            assert inode(plain) != inodes[2]
        assert inode(ours) == inodes[1]
    finally:
        for process in processes:
            process.kill()
