"""What a cache limit deletes; `infini_ds.data.cache_limit` refuses it for shards that are the only copy."""

import shutil

from streaming_forks import run_in_fork


def test_plain_streaming_deletes_the_only_copy(folder, tmp_path):
    remote = shutil.copytree(folder, tmp_path / "remote")
    code = """
    streams = [Stream(local=folder, split="train"), Stream(remote=remote, local=cache, split="train")]
    dataset = StreamingDataset(streams=streams, batch_size=1, cache_limit=30_000)
    for shard in range(34, 68):  # of the second stream
        dataset.prepare_shard(shard)
    result = None
    """
    run_in_fork(code, folder=str(folder), remote=str(remote), cache=str(tmp_path / "cache"))
    assert len(list(folder.glob("train/shard.*"))) < 34
