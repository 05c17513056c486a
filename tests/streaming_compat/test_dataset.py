"""Errors of background threads, and the threads of epochs that are left early."""

import gc
import threading
import time
import weakref

import pytest
from shards import open_dataset
from streaming_forks import run_in_fork

from infini_ds.streaming_compat.library import ShardState
from infini_ds.streaming_compat.stream import ShardError

OURS = """
from infini_ds.streaming_compat.dataset import ShardDataset
from infini_ds.streaming_compat.stream import ShardStream

stream = ShardStream(local=folder, split="train", remote_folder=None, bounded=False)
"""
EPOCH_ENDS_EARLY = """
rows = 0
try:
    for row in StreamingDataset(local=folder, split="train", batch_size=2):
        rows += 1
    result = [rows, "ended"]
except RuntimeError as error:
    result = [rows, str(error)]
"""


@pytest.fixture
def broken(folder):
    """`folder` without its fourth shard."""
    (folder / "train" / "shard.00003.mds.zstd").unlink()
    return folder


def test_plain_streaming_hides_the_error_of_a_thread(broken):
    rows, end = run_in_fork(EPOCH_ENDS_EARLY, folder=str(broken))
    assert rows < 300 and end in ("ended", "Background thread failed. Check other traceback.")


def test_ours_raises_the_error_of_a_thread_where_rows_are_read(broken, capfd):
    with pytest.raises(ShardError, match=r"shard.00003.mds is missing"):
        list(open_dataset(broken))
    assert "Traceback" not in capfd.readouterr().err


def test_plain_streaming_waits_forever_for_a_shard_that_could_not_be_prepared(broken):
    code = """
    import threading

    dataset = StreamingDataset(local=folder, split="train", batch_size=2)
    try:
        dataset.prepare_shard(3)
    except ValueError:  # it has no address to fetch the shard from
        pass
    waiting = threading.Thread(target=dataset.prepare_shard, args=(3,), daemon=True)
    waiting.start()
    waiting.join(1)
    result = waiting.is_alive()
    """
    assert run_in_fork(code, folder=str(broken)) is True


def test_ours_gives_a_shard_back_that_could_not_be_prepared(broken):
    dataset = open_dataset(broken)
    for _ in range(2):
        with pytest.raises(ShardError, match=r"shard.00003.mds is missing"):
            dataset.prepare_shard(3)
        assert dataset._shard_states[3] == ShardState.REMOTE


LEFT_AFTER_A_FAILURE = """
import threading, time

epoch = iter(dataset)
try:
    next(epoch)
except Exception:  # the thread may fail before the first row
    pass
while not dataset._event.is_set():
    time.sleep(0.01)
epoch.close()

def begin_again():
    try:
        list(dataset)
    except Exception:
        pass

again = threading.Thread(target=begin_again, daemon=True)
again.start()
again.join({seconds})
result = again.is_alive()
"""


def test_plain_streaming_waits_forever_for_a_thread_that_failed(broken):
    code = 'dataset = StreamingDataset(local=folder, split="train", batch_size=2, predownload=100)\n'
    assert run_in_fork(code + LEFT_AFTER_A_FAILURE.format(seconds=1), folder=str(broken)) is True


def test_ours_counts_a_thread_that_failed_as_ended(broken):
    code = OURS + "dataset = ShardDataset(streams=[stream], batch_size=2, predownload=100)\n"
    assert run_in_fork(code + LEFT_AFTER_A_FAILURE.format(seconds=30), folder=str(broken)) is False


def test_plain_streaming_keeps_the_threads_of_an_epoch_that_is_left(written):
    code = """
    import gc, threading, time, weakref

    dataset = StreamingDataset(local=folder, split="train", batch_size=2)
    alive, before, epoch = weakref.ref(dataset), threading.active_count(), iter(dataset)
    next(epoch)
    del dataset, epoch
    time.sleep(1)
    gc.collect()
    result = [threading.active_count() - before, alive() is not None]
    """
    assert run_in_fork(code, folder=str(written)) == [2, True]


def test_ours_ends_the_threads_of_an_epoch_that_is_left(written):
    before = threading.active_count()
    dataset = open_dataset(written)
    alive, epoch = weakref.ref(dataset), iter(dataset)
    next(epoch)
    del dataset, epoch
    deadline = time.monotonic() + 30
    while threading.active_count() > before or alive() is not None:
        assert time.monotonic() < deadline, "a thread or the dataset is still there"
        gc.collect()
        time.sleep(0.02)


WAITS_AT_EXIT = """
import multiprocessing

def run():
    dataset._shard_states[1] = ShardState.PREPARING  # by another process
    next(iter(dataset))

process = multiprocessing.get_context("fork").Process(target=run)
process.start()
process.join({seconds})
result = process.is_alive()
process.kill()
"""


def test_plain_streaming_does_not_exit_while_a_thread_waits_for_a_shard(written):
    code = 'dataset = StreamingDataset(local=folder, split="train", batch_size=2)\n'
    assert run_in_fork(code + WAITS_AT_EXIT.format(seconds=2), folder=str(written)) is True


def test_ours_exits_while_a_thread_waits_for_a_shard(written):
    code = OURS + "dataset = ShardDataset(streams=[stream], batch_size=2)\n"
    assert run_in_fork(code + WAITS_AT_EXIT.format(seconds=30), folder=str(written)) is False


def test_rows_have_their_number(written):
    dataset = open_dataset(written)
    assert [row["row"] for row in dataset] == list(range(300))
