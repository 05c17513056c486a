"""Graceful shutdown: signals, launchers that end, ranks that die. What was stopped resumes with the same losses."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from harness import ROOT, SHAPE, STEPS, environment, launcher, pretrain, start_ranks

from infini_ds.distributed.environment import detect_environment, free_port, set_cpu_threads
from infini_ds.metrics.metric_writers import read_metrics

# Without an end, and with the same losses whatever the number of steps.
ENDLESS = [*STEPS, "steps=100000", "schedule.kind=constant", "checkpoint.every=100000"]
TWO_RANKS = ["--num_gpus", "2", "--log_level", "error", "--master_port", free_port()]
LAUNCHERS = {
    "python": [sys.executable],
    "deepspeed": [*launcher("deepspeed"), *TWO_RANKS],
    "torchrun": [*launcher("torchrun"), "--nproc-per-node", "2", "--master-port", free_port()],
    "graceful": [sys.executable, "launch/graceful.py", sys.executable, "-m", "deepspeed.launcher.runner", *TWO_RANKS],
}


class Job:
    """A command in a session of its own, as a terminal gives each command a process group; it prints into a file."""

    def __init__(self, command: list[str | Path], run: Path):
        self.run, self.file = run, run.parent / f"{run.name}.txt"
        self.steps_before = len(recorded(run, "train/loss"))
        self.descendants: list[psutil.Process] = []
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
        """Wait until it has recorded so many more steps."""
        self.wait_for(lambda: len(recorded(self.run, "train/loss")) >= self.steps_before + steps)
        self.descendants = psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, condition: Callable[[], bool], limit: float = 240.0) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def rank(self, number: int) -> psutil.Process:
        return next(
            process
            for process in self.descendants
            if process.environ().get("RANK") == str(number) and "launch/pretrain.py" in process.cmdline()
        )

    def signal_all(self, number: int) -> None:
        """Send a signal to all of its processes, as Ctrl-C on a terminal does."""
        os.killpg(self.process.pid, number)

    def exit_code(self, limit: float = 60.0) -> int:
        """Wait until all of its processes are gone, those that a dead launcher left too; return the command's code."""
        code = self.process.wait(limit)
        alive = psutil.wait_procs(self.descendants, timeout=limit)[1]
        assert not alive, self.output
        return code


def recorded(run: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(run) if name in line]


@pytest.fixture
def start(shards, tmp_path):
    jobs = []

    def begin(name: str, *overrides: str) -> Job:
        where = [f"data.path={shards}", f"output={tmp_path}", "name=stopped"]
        arguments = ["launch/pretrain.py", *where, *SHAPE, *ENDLESS, *overrides]
        jobs.append(Job([*LAUNCHERS[name], *arguments], tmp_path / "stopped"))
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
    """As many threads as a run by itself takes: the last bit of norms' gradients, sums over threads, depends on it."""
    set_cpu_threads(detect_environment())
    yield
    torch.set_num_threads(1)


def test_a_signal_during_validation_aborts_it_and_the_next_run_repeats_it(start, shards, tmp_path, all_cores):
    """There is a validation after every step, so the signal arrives in one. It goes to the data workers too."""
    stopped = tmp_path / "stopped"
    job = start("python", "validation.every=1", "validation.rows=16", "data.workers=1")
    job.wait_for_steps(5)
    job.signal_all(signal.SIGTERM)
    assert job.exit_code() == 75, job.output
    assert job.output.count("stopped by SIGTERM at step") == 1 and "Traceback" not in job.output, job.output
    step = len(recorded(stopped, "train/loss"))
    assert [line["step"] for line in read_metrics(stopped) if "validation/loss" in line] == list(range(step))

    pretrain(shards, tmp_path, "stopped", *ENDLESS, "validation.every=1", "validation.rows=4", f"steps={step + 3}")
    assert [line["step"] for line in read_metrics(stopped) if "validation/loss" in line] == list(range(step + 4))
    pretrain(shards, tmp_path, "undisturbed", *ENDLESS, f"steps={step + 3}")
    assert recorded(stopped, "train/loss") == recorded(tmp_path / "undisturbed", "train/loss")


@pytest.mark.timeout(900)
def test_two_ranks_stop_and_fail_together_under_every_launcher(start, shards, tmp_path):
    """The `deepspeed` command ends and leaves ranks; Ctrl-C under torchrun; a rank dies under launch/graceful.py."""
    job = start("deepspeed")
    job.wait_for_steps(5)
    job.process.terminate()
    assert job.exit_code() == -signal.SIGTERM
    assert "stopped by the end of the launcher at step" in job.output

    saved = len(recorded(job.run, "train/loss"))
    job = start("torchrun")
    job.wait_for_steps(5)
    job.signal_all(signal.SIGINT)
    assert job.exit_code() == 1  # torchrun's own
    assert "resumed from" in job.output and "stopped by SIGINT at step" in job.output, job.output
    saved = len(recorded(job.run, "train/loss"))

    job = start("graceful")
    job.wait_for_steps(5)
    job.rank(1).kill()
    assert job.exit_code(30.0) == 256 - signal.SIGKILL
    assert job.output.count("error on rank 0: lost contact with rank 1 (") == 1
    assert "Traceback" not in job.output, job.output

    pretrain(shards, tmp_path, "alone", *ENDLESS, f"steps={saved}")
    alone = recorded(tmp_path / "alone", "train/loss")
    assert max(abs(a - b) for a, b in zip(alone, recorded(job.run, "train/loss"), strict=False)) < 1e-4


def test_a_run_that_was_suspended_goes_on():
    """As by Ctrl-Z and `fg`, or `scontrol suspend` and `resume`."""
    code = "import time; from infini_ds.distributed.signals import GracefulShutdown; shutdown = GracefulShutdown()\n"
    code += "shutdown.listen(); print('listens', flush=True); time.sleep(3); print('received', shutdown.received)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None and process.stdout.readline() == "listens\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)  # longer than the listener waits at a time
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "received 0\n"


def test_ctrl_c_on_the_quickstart_is_one_sentence(shards, tmp_path):
    run = tmp_path / "quick"
    where = [f"data.path={shards}", f"output={tmp_path}", "name=quick"]
    command = [sys.executable, "launch/quickstart.py", "--config", "launch/recipes/tiny-cpu.yaml", *where, *SHAPE]
    job = Job([*command, *ENDLESS, "stability.check_gradients=false"], run)  # which Muon does not allow
    job.wait_for_steps(5)
    job.signal_all(signal.SIGINT)
    assert job.exit_code() == 75, job.output
    printed = job.output[job.output.index("=== training") :]
    assert printed.count("stopped by SIGINT at step") == 1 and "=== export" not in printed
    assert not any(word in printed for word in ("Traceback", "error", "ERROR", "Killing")), printed


@pytest.mark.parametrize("by", ["time", "second Ctrl-C"])
def test_a_rank_that_hangs_keeps_the_others_no_longer_than_the_limit(by, shards, tmp_path):
    """They wait in a call into C, where Python runs no signal handler."""
    where = [f"data.path={shards}", f"output={tmp_path}", "name=hangs"]
    first, hanging = start_ranks(2, *where, *SHAPE, *ENDLESS, f"timeout_minutes={0.2 if by == 'time' else 30}")
    try:
        while len(recorded(tmp_path / "hangs", "train/loss")) < 3:
            assert first.poll() is None
            time.sleep(0.01)
        os.kill(hanging.pid, signal.SIGSTOP)
        if by == "second Ctrl-C":
            os.kill(first.pid, signal.SIGINT)
            while "a second Ctrl-C ends it at once" not in first.output:  # it counts from when it received the first
                assert first.poll() is None
                time.sleep(0.01)
            time.sleep(1.5)
            assert first.poll() is None
            os.kill(first.pid, signal.SIGINT)
        output, _ = first.communicate(timeout=60)
    finally:
        hanging.kill()
    if by == "time":
        assert first.returncode == 1 and "error on rank 0: lost contact with rank 1 (" in output, output
    else:
        assert first.returncode == 130 and "stopped by" not in output, output
