"""Shared memory of killed runs is removed, and that of running ones is not."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import ROOT, environment
from streaming_forks import run_in_fork

from infini_ds.streaming_compat.shm_prefix import SHM
from infini_ds.streaming_compat.stale_memory import find_shared_files, one_start_at_a_time, remove_stale

# Processes that keep a dataset open until they are killed: `start(open_dataset)` returns the process and its prefix.
PROCESSES = """
import multiprocessing, os, signal, time

fork = multiprocessing.get_context("fork")
prefixes = fork.SimpleQueue()

def open_plain():
    return StreamingDataset(local=folder, split="train", batch_size=2)

def open_ours():
    from infini_ds.streaming_compat.dataset import ShardDataset
    from infini_ds.streaming_compat.stream import ShardStream

    stream = ShardStream(local=folder, split="train", remote_folder=None, bounded=False)
    return ShardDataset(streams=[stream], batch_size=2)

def start(open_dataset):
    def run():
        os.setsid()  # with its resource tracker, which would remove the shared memory after it
        dataset = open_dataset()
        prefixes.put(dataset._shm_prefix_int)
        time.sleep(600)

    process = fork.Process(target=run)
    process.start()
    return process, prefixes.get()

def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.join()

def segments(prefix):
    names = [name for name in os.listdir("/dev/shm") if name.startswith(f"{prefix:06}_")]
    return {name: os.stat(f"/dev/shm/{name}").st_ino for name in names}
"""


def test_plain_streaming_leaves_the_memory_of_killed_runs(written):
    code = """
    with one_start_at_a_time(True):  # no run of this project removes it meanwhile
        process, prefix = start(open_plain)
        kill(process)
        left = segments(prefix)
        open_plain()
        result = bool(left) and segments(prefix) == left
        for name in left:
            os.unlink(f"/dev/shm/{name}")
    """
    imports = "from infini_ds.streaming_compat.stale_memory import one_start_at_a_time\n"
    assert run_in_fork(imports + PROCESSES + "if True:" + code, folder=str(written)) is True


def test_memory_of_killed_runs_is_removed_and_of_running_ones_is_not(written):
    """Three processes: one of ours that is killed, one of ours and one of plain streaming that run.

    Where the second cannot be seen, as from another container, it is known by its lock alone. The third has none.
    """
    start = """
from infini_ds.streaming_compat.stale_memory import find_shared_files, remove_stale

dead, ours, plain = start(open_ours), start(open_ours), start(open_plain)
try:
    before = [segments(prefix) for _, prefix in (dead, ours, plain)]
    kill(dead[0])
    remove_stale()
    in_use = {shared.prefix: shared.in_use for shared in find_shared_files()}
    gone = not before[0].items() & segments(dead[1]).items()  # another run may have its prefix by now
    stay = [segments(prefix) == files for (_, prefix), files in zip((ours, plain), before[1:])]
    result = [gone, stay, in_use[ours[1]], in_use[plain[1]]]
    unseen = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", remove]
    kill(plain[0])  # without a lock it would be taken for a dead one there
    if subprocess.run(unseen, capture_output=True, cwd=root).returncode == 0:  # else that is not permitted
        result.append(segments(ours[1]) == before[1] and not before[2].items() & segments(plain[1]).items())
finally:
    for process, _ in (dead, ours, plain):
        if process.is_alive():
            kill(process)
    remove_stale()
"""
    remove = "from infini_ds.streaming_compat.stale_memory import remove_stale; remove_stale()"
    code = "import subprocess, sys\n" + PROCESSES + start
    result = run_in_fork(code, folder=str(written), remove=remove, root=str(ROOT))
    assert result[:4] == [True, [True, True], True, True]
    assert result[4:] in ([True], [])


def test_nothing_is_removed_while_a_run_starts():
    """What a starting run has created, but has no lock on yet, looks stale to a process of another container."""
    code = "from infini_ds.streaming_compat.stale_memory import remove_stale; print(flush=True); remove_stale()"
    with one_start_at_a_time(first_on_node=True):
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
        other.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1)
    assert other.wait(30) == 0


def test_a_users_stale_files_are_found_by_prefix(written):
    """Files with a name of streaming's that no process uses."""
    prefix = 900_000 + time.time_ns() % 90_000
    file = Path(SHM, f"{prefix:06}_locals")
    with one_start_at_a_time(first_on_node=True):
        file.touch()
        (found,) = [shared for shared in find_shared_files() if shared.prefix == prefix]
        assert (found.files, found.stale, found.ours) == ((file,), True, True)
    assert prefix in [shared.prefix for shared in remove_stale()] or not file.exists()
    assert not file.exists()
