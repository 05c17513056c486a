"""Segments of shared memory are closed with the last reference to them."""

from streaming_forks import run_in_fork

CODE = """
import gc, os

def open_files():
    {open_dataset}
    gc.collect()
    return len(os.listdir("/proc/self/fd"))

before = open_files()
result = [open_files() - before for _ in range(5)]
"""


def test_plain_streaming_keeps_all_segments_open(written):
    grown = run_in_fork(CODE.format(open_dataset='StreamingDataset(local=folder, split="train")'), folder=str(written))
    assert grown[-1] > grown[0] > 5


def test_ours_closes_them(written):
    ours = """
    from infini_ds.streaming_compat.dataset import ShardDataset, lock_segment
    from infini_ds.streaming_compat.stream import ShardStream
    ShardDataset(streams=[ShardStream(local=folder, split="train", remote_folder=None, bounded=False)])
"""
    assert run_in_fork(CODE.format(open_dataset=ours.strip()), folder=str(written)) == [0] * 5
