"""A job of two ranks that is killed again and again, also while it saves, ends like one that was never stopped.

pytest tests/training/test_faults.py --kills=20 -s      the long version; prints its figures
"""

import contextlib
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from harness import SHAPE, run_ranks, start_ranks

from infini_ds.checkpoint.manifest import complete_checkpoints, incomplete_checkpoints, read_manifest
from infini_ds.conversion.locate import load_model, locate
from infini_ds.metrics.metric_writers import read_metrics

RANKS = 2
LIMIT = 180.0  # seconds for a start
STILL = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def kill(processes) -> str:
    """Send SIGKILL to all processes of the job and their workers; the next start removes their shared memory.

    Returns the output of the first rank.
    """
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
    outputs = [process.communicate()[0] for process in processes]
    return outputs[0]


def wait_until(processes, condition) -> None:
    """Poll `condition` every millisecond, while the job lives."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), "the job ended before its kill"
        time.sleep(0.001)


def freeze(processes, condition) -> bool:
    """Return whether `condition` holds, and stop all processes of the job, data workers included, if it does."""
    if not condition():
        return False
    groups = [process.pid for process in processes]
    for group in groups:
        os.killpg(group, signal.SIGSTOP)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            while os.getpgid(process.pid) in groups and process.status() not in STILL:
                time.sleep(0.001)
    if condition():
        return True
    for group in groups:
        os.killpg(group, signal.SIGCONT)
    return False


def recorded(run: Path, since: int) -> int:
    """Return the number of recorded steps, once a job started at `since` (ns) has removed those that it repeats."""
    file = run / "metrics.jsonl"
    return len(losses(run)) if file.exists() and file.stat().st_mtime_ns > since else 0


def half_written(run: Path, since: int) -> dict[Path, int]:
    """Return the checkpoints that a job started at `since` (ns) is writing or removing, with their numbers of files."""
    found = {}
    for folder in incomplete_checkpoints(run):
        with contextlib.suppress(FileNotFoundError):
            if folder.stat().st_mtime_ns > since:
                found[folder] = len(os.listdir(folder))
    return found


def has_half_written(run: Path, since: int, files: int) -> bool:
    return any(has >= files for has in half_written(run, since).values())


@pytest.mark.timeout(3600)
def test_killed_at_any_instant_equals_never_stopped(shards, tmp_path, request):
    """Kills at random instants, in turn: while it trains, while it writes a checkpoint, while it starts."""
    kills, draw = request.config.getoption("--kills"), random.Random(0)
    steps = 10 * kills
    recipe = ["batch.rows=4", "batch.micro_rows=2", f"steps={steps}", "log_every=1", "validation.every=0"]
    recipe += ["optimizer.learning_rate=0.005", "schedule.warmup_steps=4", "checkpoint.every=2"]
    arguments = [f"data.path={shards}", f"output={tmp_path}", *SHAPE, *recipe]
    run_ranks(RANKS, *arguments, "name=undisturbed")

    run, while_saving, skipped = tmp_path / "killed", 0, 0
    for number in range(kills):
        kind = ("training", "saving", "starting")[number % 3]
        standing = len(complete_checkpoints(run)) and read_manifest(complete_checkpoints(run)[-1]).state.step
        since, processes = time.time_ns(), start_ranks(RANKS, *arguments, "name=killed")
        try:
            if kind == "starting":
                time.sleep(draw.uniform(0.1, 2))
            elif kind == "training":
                target = standing + draw.randint(1, 16)
                wait_until(processes, lambda n=target, t=since: recorded(run, t) >= n)
                time.sleep(draw.uniform(0, 0.05))
            else:
                # Frozen, since on a busy machine the job may complete the checkpoint before it is killed.
                is_saving = partial(has_half_written, run, since, draw.randrange(6))
                wait_until(processes, partial(freeze, processes, is_saving))
        finally:
            output = kill(processes)
        half = [f"{folder.name} with {has} files" for folder, has in half_written(run, since).items()]
        good = complete_checkpoints(run)
        while_saving += bool(half)
        skipped += "is incomplete" in output
        print(
            f"kill {number + 1}, {kind}: {len(losses(run))} of {steps} steps recorded, "
            f"{good[-1].name if good else 'no checkpoint'} is the newest, {', '.join(half) or 'none'} half written",
            flush=True,
        )
    skipped += "is incomplete" in run_ranks(RANKS, *arguments, "name=killed")

    a, b = (load_model(locate(folder)).state_dict() for folder in (run, tmp_path / "undisturbed"))
    equal = [name for name in a if torch.equal(a[name], b[name])]
    ours, theirs = losses(run), losses(tmp_path / "undisturbed")
    print(
        f"{kills} kills, {while_saving} with a checkpoint half written, skipped at {skipped} starts; "
        f"{sum(x == y for x, y in zip(ours, theirs, strict=True))} of {steps} losses and {len(equal)} of {len(a)} "
        f"tensors equal; last loss {ours[-1]!r}, of the run never stopped {theirs[-1]!r}"
    )
    assert while_saving >= kills // 3
    assert ours == theirs
    assert len(equal) == len(a)
