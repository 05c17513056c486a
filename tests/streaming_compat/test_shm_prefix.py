"""Datasets that start at the same time have prefixes of their own, and may share a cache."""

from streaming_forks import run_in_fork

from infini_ds.streaming_compat.stale_memory import one_start_at_a_time

OURS = """
from infini_ds.streaming_compat.dataset import ShardDataset
from infini_ds.streaming_compat.stream import ShardStream

def open_dataset():
    stream = ShardStream(local=folder, split="train", remote_folder=remote, bounded=False)
    return ShardDataset(streams=[stream], batch_size=2)
"""


def test_plain_streaming_gives_one_prefix_twice(written):
    code = """
    result = race(
        lambda: StreamingDataset(local=folder, split="train", batch_size=2), rounds=4000, until_error=True
    )
    """
    errors = run_in_fork(code, folder=str(written))
    assert any(error.startswith("FileExistsError") for error in errors)


def test_ours_gives_each_start_its_own(written):
    with one_start_at_a_time(first_on_node=True):  # no other test takes what is just being created for stale
        assert run_in_fork(OURS + "result = race(open_dataset)", folder=str(written), remote=None) == []


def test_ours_skips_a_prefix_whose_last_run_is_removing_its_segments(written):
    code = """
    from infini_ds.streaming_compat import shm_prefix
    from infini_ds.streaming_compat.library import World

    prefixes = []
    for _ in range(2):
        prefix, segment = shm_prefix.take_prefix([folder], [None], World.detect())
        prefixes.append(prefix)
        del segment  # its other segments are not yet removed
        left = shm_prefix.SHM / f"{prefix:06}_barrier"
        left.touch()
    left.unlink()
    (shm_prefix.SHM / f"{prefixes[0]:06}_barrier").unlink()
    result = prefixes[0] < prefixes[1]
    """
    assert run_in_fork(code, folder=str(written))


def test_plain_streaming_refuses_a_cache_that_is_in_use(written, tmp_path):
    code = """
    def open_twice(cache):
        def open_dataset():
            return StreamingDataset(local=cache, remote=remote, split="train", batch_size=2)

        first = open_dataset()
        try:
            open_dataset()
        except ValueError as error:
            return str(error)
        return "opened"

    # It misses what lies after a free prefix, which another test may just have left.
    results = (open_twice(f"{cache}{attempt}") for attempt in range(50))
    result = next((text for text in results if text != "opened"), "opened")
    """
    result = run_in_fork(code, remote=str(written), cache=str(tmp_path / "cache"))
    assert result.startswith("Reused local directory")


def test_ours_shares_a_cache(written, tmp_path):
    cache = tmp_path / "cache"
    (cache / "train").mkdir(parents=True)
    (cache / "train" / "index.json").write_bytes((written / "train" / "index.json").read_bytes())
    code = "first, second = open_dataset(), open_dataset()\nresult = [len(list(first)), len(list(second))]"
    assert run_in_fork(OURS + code, folder=str(cache), remote=str(written)) == [300, 300]
