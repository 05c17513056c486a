"""Stopping: signals, launchers and ranks that die. Each test goes on with what it stopped, to the same losses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from harness import ROOT, SHAPE, STEPS, environment, pretrain, start_ranks

from infini_ds.distributed.environment import detect_environment, free_port, set_cpu_threads
from infini_ds.metrics.metric_writers import read_metrics

BIN = Path(sys.executable).parent
# Endless, and the same whatever the number of steps.
CHOICES = [*STEPS, "steps=100000", "schedule.kind=constant", "checkpoint.every=100000"]
LAUNCHERS = {
    "python": [sys.executable],
    "deepspeed": [BIN / "deepspeed", "--num_gpus", "2", "--log_level", "error", "--master_port", free_port()],
    "torchrun": [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", free_port()],
}
LAUNCHERS["held"] = [sys.executable, "launch/graceful.py", *LAUNCHERS["deepspeed"]]


class Job:
    """A run in a session of its own, as a terminal gives each command a process group; it prints into a file."""

    def __init__(self, command: list, run: Path):
        self.run, self.file = run, run.parent / f"{run.name}.txt"
        self.begun = len(recorded(run, "train/loss"))
        self.below: list[psutil.Process] = []
        with self.file.open("w") as output:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=environment(OMP_NUM_THREADS="1"),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.file.read_text()

    def wait_for_steps(self, steps: int) -> None:
        """Until it has recorded so many more steps."""
        self.wait_for(lambda: len(recorded(self.run, "train/loss")) >= self.begun + steps)
        self.below = psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, condition, limit: float = 240.0) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def rank(self, number: int) -> psutil.Process:
        return next(
            p for p in self.below if p.environ().get("RANK") == str(number) and "launch/pretrain.py" in p.cmdline()
        )

    def signal_all(self, number: int) -> None:
        """What Ctrl-C on a terminal does."""
        os.killpg(self.process.pid, number)

    def end(self, limit: float = 60.0) -> int:
        """The exit code, once all of its processes are gone, those that a dead launcher left too."""
        code = self.process.wait(limit)
        alive = psutil.wait_procs(self.below, timeout=limit)[1]
        assert not alive, self.output
        return code


def recorded(run: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(run) if name in line]


@pytest.fixture
def start(shards, tmp_path):
    jobs = []

    def begin(launcher: str, *overrides: str) -> Job:
        where = [f"data.path={shards}", f"output={tmp_path}", "name=stopped"]
        arguments = ["launch/pretrain.py", *where, *SHAPE, *CHOICES, *overrides]
        jobs.append(Job([*LAUNCHERS[launcher], *arguments], tmp_path / "stopped"))
        return jobs[-1]

    yield begin
    for job in jobs:
        for process in psutil.process_iter():
            if f"output={tmp_path}" in _command(process):
                process.kill()
        job.process.wait()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def all_cores():
    """As many threads as a run by itself takes: gradients of norms are sums over threads, whose last bit shows it."""
    set_cpu_threads(detect_environment())
    yield
    torch.set_num_threads(1)


def test_a_signal_in_the_validation_leaves_it_saves_and_the_next_run_makes_it(start, shards, tmp_path, all_cores):
    """A validation behind every step: there the signal finds it. It goes to the data workers too."""
    stopped = tmp_path / "stopped"
    job = start("python", "validation.every=1", "validation.rows=16", "data.workers=1")
    job.wait_for_steps(5)
    job.signal_all(signal.SIGTERM)
    assert job.end() == 75, job.output
    assert job.output.count("stopped by SIGTERM at step") == 1 and "Traceback" not in job.output, job.output
    step = len(recorded(stopped, "train/loss"))
    assert [line["step"] for line in read_metrics(stopped) if "validation/loss" in line] == list(range(step))

    pretrain(shards, tmp_path, "stopped", *CHOICES, "validation.every=1", "validation.rows=4", f"steps={step + 3}")
    assert [line["step"] for line in read_metrics(stopped) if "validation/loss" in line] == list(range(step + 4))
    pretrain(shards, tmp_path, "undisturbed", *CHOICES, f"steps={step + 3}")
    assert recorded(stopped, "train/loss") == recorded(tmp_path / "undisturbed", "train/loss")


@pytest.mark.timeout(900)
def test_two_ranks_stop_and_fail_together_however_they_were_started(start, shards, tmp_path):
    """The end of the `deepspeed` command, which leaves its ranks; Ctrl-C under torchrun; a rank that dies under a
    launcher that is held.
    """
    job = start("deepspeed")
    job.wait_for_steps(5)
    job.process.terminate()
    assert job.end() == -signal.SIGTERM
    assert "stopped by the end of the launcher at step" in job.output

    job = start("torchrun")
    job.wait_for_steps(5)
    job.signal_all(signal.SIGINT)
    assert job.end() == 1  # torchrun's own
    assert "going on from" in job.output and "stopped by SIGINT at step" in job.output, job.output
    saved = len(recorded(job.run, "train/loss"))

    job = start("held")
    job.wait_for_steps(5)
    job.rank(1).kill()
    assert job.end(30.0) == 256 - signal.SIGKILL
    assert job.output.count("error on rank 0: lost contact with rank 1 (") == 1
    assert "Traceback" not in job.output, job.output

    pretrain(shards, tmp_path, "alone", *CHOICES, f"steps={saved}")
    alone = recorded(tmp_path / "alone", "train/loss")
    assert max(abs(a - b) for a, b in zip(alone, recorded(job.run, "train/loss"), strict=False)) < 1e-4


def test_ctrl_c_on_the_quickstart_is_one_sentence(shards, tmp_path):
    run = tmp_path / "quick"
    where = [f"data.path={shards}", f"output={tmp_path}", "name=quick"]
    command = [sys.executable, "launch/quickstart.py", "--config", "launch/recipes/tiny-cpu.yaml", *where, *SHAPE]
    job = Job([*command, *CHOICES], run)
    job.wait_for_steps(5)
    job.signal_all(signal.SIGINT)
    assert job.end() == 75, job.output
    said = job.output[job.output.index("=== training") :]
    assert said.count("stopped by SIGINT at step") == 1 and "=== export" not in said
    assert not any(word in said for word in ("Traceback", "error", "ERROR", "Killing")), said


@pytest.mark.parametrize("by", ["time", "second Ctrl-C"])
def test_a_rank_that_hangs_holds_the_others_no_longer_than_they_are_told(by, shards, tmp_path):
    """They wait in a call into C, where Python runs no handler of a signal."""
    where = [f"data.path={shards}", f"output={tmp_path}", "name=hangs"]
    first, hangs = start_ranks(2, *where, *SHAPE, *CHOICES, f"timeout_minutes={0.1 if by == 'time' else 30}")
    try:
        while len(recorded(tmp_path / "hangs", "train/loss")) < 3:
            assert first.poll() is None
            time.sleep(0.01)
        os.kill(hangs.pid, signal.SIGSTOP)
        if by == "second Ctrl-C":
            os.kill(first.pid, signal.SIGINT)
            time.sleep(1.5)
            assert first.poll() is None
            os.kill(first.pid, signal.SIGINT)
        output, _ = first.communicate(timeout=60)
    finally:
        hangs.kill()
    if by == "time":
        assert first.returncode == 1 and "error on rank 0: lost contact with rank 1 (" in output, output
    else:
        assert first.returncode == 130 and "stopped by" not in output, output
