"""Training rows are the same for any ranks, workers and stops; damaged shards are restored or named."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import ROOT, environment, free_port
from ranks import SEED, Job, read, sources_of
from shards import flip

from infini_ds.data.streams import TrainingStream, ValidationRows
from infini_ds.utils.errors import UserError

RANKS = ROOT / "tests" / "support" / "ranks.py"


def open_stream(path, rows=4, workers=0) -> TrainingStream:
    return TrainingStream(sources_of(path), rows, SEED, workers)


def rows_of(folder: Path) -> range:
    return range(json.loads((folder / "manifest.json").read_text())["train"]["rows"])


def run_two_ranks(folder: Path, streams: list[dict], rows: int, jobs: list[Job]) -> list:
    """Return for each job what each of two ranks read, and its state."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def start(rank: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, RANKS],
            input=json.dumps([str(folder), streams, rows, jobs]),
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            text=True,
            capture_output=True,
            timeout=120,
        )

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(start, range(2)):
            assert done.returncode == 0, done.stderr
    return list(zip(*(json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)), strict=True))


def test_rows_do_not_depend_on_ranks_workers_or_stops(many, shards, tmp_path):
    """Two streams in the proportion 3 : 1. Two ranks read in two epochs what one rank reads, at once or from any stop.

    With and without workers; one rank continues where two have stopped; and two ranks of one sequence group read the
    same rows.
    """
    streams, rows = [{"path": str(many), "proportion": 3}, {"path": str(shards), "proportion": 1}], 16

    def alone(state, workers, count):
        stream = TrainingStream(sources_of(*streams), rows, SEED, workers)
        if state:
            stream.load_state_dict(state)
        return read(stream, count), stream.state_dict()

    per_epoch = sum(len(rows_of(path)) for path in (many, shards)) // rows
    total = 2 * per_epoch + 3
    expected, _ = alone(None, 0, total)
    assert alone(None, 2, total)[0] == expected
    stops = (1, per_epoch - 1, per_epoch, per_epoch + 1)
    states = {stop: alone(None, 0, stop)[1] for stop in stops}
    for stop, state in states.items():
        assert alone(state, 2 * (stop % 2), 4)[0] == expected[stop : stop + 4], stop

    jobs = [Job(None, 0, total), *(Job(state, 2 * (stop % 2), 4) for stop, state in states.items())]
    jobs += [Job(None, 0, 3, sequence=2), Job(states[per_epoch - 1], 2, 3, sequence=2)]
    done = run_two_ranks(tmp_path, streams, rows, jobs)
    for job, first, ranks in zip(jobs, (0, *stops, 0, per_epoch - 1), done, strict=True):
        of_ranks = [[list(map(tuple, batch)) for batch in batches] for batches, _ in ranks]
        if job.sequence == 2:
            assert of_ranks == [expected[first : first + job.count]] * 2
        else:
            together = [sorted(a + b) for a, b in zip(*of_ranks, strict=True)]
            assert together == [sorted(batch) for batch in expected[first : first + job.count]], first
        after = first + job.count
        if after < total:
            assert alone(ranks[0][1], 0, 1)[0] == expected[after : after + 1]

    first_epoch = [number for batch in expected[:per_epoch] for number, _ in batch]
    of_first = sum(number < len(rows_of(many)) for number in first_epoch) / len(first_epoch)
    assert abs(of_first - 0.75) < 0.02
    assert [number for batch in expected[per_epoch : 2 * per_epoch] for number, _ in batch] != first_epoch


def test_an_epoch_takes_each_row_once_and_repeat_more(many, shards):
    n = len(rows_of(many))
    per_epoch = n // 4
    epoch = [number for batch in read(open_stream(many), per_epoch) for number, _ in batch]
    assert len(set(epoch)) == len(epoch) == 4 * per_epoch
    stream = TrainingStream(sources_of({"path": str(many), "repeat": 2}, shards), 4, SEED, 0)
    of_epoch = 2 * n + len(rows_of(shards))
    seen = Counter(number for batch in read(stream, of_epoch // 4) for number, _ in batch)
    missing = sum(2 - seen[number] for number in range(n)) + sum(1 - seen[n + i] for i in rows_of(shards))
    assert missing == of_epoch % 4
    assert max(seen.values()) == 2 and max(seen[n + i] for i in rows_of(shards)) == 1


def test_a_position_of_other_data_is_refused(many, shards):
    state = open_stream(many).state_dict()
    open_stream(many).load_state_dict(state)
    with pytest.raises(UserError, match="the checkpoint was saved with other training data"):
        open_stream(shards).load_state_dict(state)
    with pytest.raises(UserError, match="the checkpoint was saved with other training data"):
        open_stream(many, rows=2).load_state_dict(state)
    del state["fingerprint"]  # as earlier versions saved it
    open_stream(shards).load_state_dict(state)


def test_fewer_rows_than_a_step_get_a_sentence(many):
    n = len(rows_of(many))
    with pytest.raises(UserError, match=rf"path={many} has {n} training rows, fewer than the {n + 1} rows of one step"):
        open_stream(many, rows=n + 1)


def test_nothing_of_a_dropped_stream_stays_open(many):
    """Streams that are dropped within an epoch, as by a rollback: no segment, file or thread of them stays."""

    def in_use() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def use_and_drop() -> None:
        read(open_stream(many), 3)
        ValidationRows(sources_of(many))[0]

    use_and_drop()
    before, deadline = in_use(), time.monotonic() + 60
    for _ in range(5):
        use_and_drop()
    while any(now > then for now, then in zip(in_use(), before, strict=True)):
        assert time.monotonic() < deadline, f"{before} open files and threads became {in_use()}"
        time.sleep(0.02)  # threads look every few milliseconds whether to end


def test_validation_rows_come_from_each_source_in_turn(many, shards):
    both = ValidationRows(sources_of(many, shards))
    first, second = (ValidationRows(sources_of(path)) for path in (many, shards))
    assert len(both) == len(first) + len(second)
    for i, (rows, j) in enumerate([(first, 0), (second, 0), (first, 1), (second, 1)]):
        assert (both[i]["input_ids"] == rows[j]["input_ids"]).all()


def test_validation_batches_are_split_across_ranks(many):
    rows = ValidationRows(sources_of(many))
    numbers = [row["row"] for row in (rows[i] for i in range(7))]
    batches = [list(rows.batches(2, 7, rank, 3)) for rank in range(3)]
    assert [[batch.row_numbers for batch in mine] for mine in batches] == [
        [[numbers[0], numbers[3]], [numbers[6]]],
        [[numbers[1], numbers[4]]],
        [[numbers[2], numbers[5]]],
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_restored_or_named(workers, copy, capfd):
    """Damaged in the expanded form it is restored from the compressed one. In both: a sentence, without a stack."""
    expected = read(open_stream(copy), 20)
    expanded = sorted((copy / "train").glob("*.mds"))[1]
    flip(expanded)
    assert read(open_stream(copy, workers=workers), 20) == expected
    assert f"{expanded} is damaged: restoring it from {expanded.name}.zstd" in capfd.readouterr().out

    flip(expanded)
    flip(expanded.with_name(expanded.name + ".zstd"))
    stream = open_stream(copy, workers=workers)
    with pytest.raises(UserError) as error:
        read(stream, 20)
    if workers:  # else the error's stack keeps it alive, and torch waits 10 s when it is garbage
        stream.loader._iterator._shutdown_workers()
    assert str(error.value).startswith(f"{expanded}.zstd is damaged, its checksum is not that of index.json")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_damaged_validation_shard_is_named(copy):
    flip(copy / "validation" / "shard.00000.mds.zstd")
    with pytest.raises(UserError, match=r"validation/shard.00000.mds.zstd is damaged"):
        list(ValidationRows(sources_of(copy)).batches(4, None))
