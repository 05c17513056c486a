"""Execute a study's commands on this machine: several runs at once, each on its own cores or its own GPU."""

import contextlib
import logging
import os
import queue
import shlex
import signal
import subprocess
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from infini_ds.distributed.signals import STOPPED_EARLY
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.study.commands import StudyCommands
from infini_ds.study.grid import Run
from infini_ds.study.run_folder import begin
from infini_ds.utils.errors import UserError
from infini_ds.utils.progress import ProgressBar

logger = logging.getLogger(__name__)

LOG = "study.log"  # in the run's folder: the output of its commands
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class RunFailure:
    """A run whose command failed, or that was not started because the run that it starts from failed."""

    run: str
    reason: str
    log: Path | None = None

    @property
    def explanation(self) -> str:
        return self.reason + (f"; see {self.log}" if self.log else "")

    def __str__(self) -> str:
        return f"{self.run}: {self.explanation}"


class StudyStopped(Exception):
    """A signal asked the study to stop."""


class ChildProcesses:
    """The running commands. Forwards SIGTERM to them on shutdown, so that training writes a checkpoint."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def install_signal_handlers(self) -> None:
        """Let SIGTERM, SIGUSR1 and Ctrl-C stop the study; a second Ctrl-C kills the running commands."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # a shell starts background jobs with SIGINT ignored
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.stop_requested and number == signal.SIGINT:
            for process in list(self._running):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        elif not self.stop_requested:
            self.stop_requested = True
            for process in list(self._running):
                process.send_signal(signal.SIGTERM)
            name = signal.Signals(number).name
            # Not by logging: a handler may interrupt a log call that holds logging's lock, or rich's.
            os.write(1, f"{name}: waiting for running commands to save and exit; Ctrl-C again kills them\n".encode())

    def run(self, arguments: tuple[str, ...], environment: dict[str, str], log: TextIO | None = None) -> int:
        """Run a command until it exits and return its exit code.

        Args:
            log: receives its output; None: this process's own output.
        Raises:
            StudyStopped: a stop was requested before or while it ran, or the command itself was stopped and has saved.
        """
        with self._lock:  # so that no command starts after a stop was requested
            if self.stop_requested:
                raise StudyStopped
            # A session of its own, so that a Ctrl-C in the terminal does not reach it a second time.
            process = subprocess.Popen(
                arguments,
                env=environment,
                stdout=log,
                stderr=None if log is None else subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process)
        if self.stop_requested:  # between the check and the start
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        self._running.discard(process)
        if code and (self.stop_requested or code == STOPPED_EARLY):
            raise StudyStopped
        return code


def prepare_data(commands: StudyCommands, runs: list[Run], children: ChildProcesses) -> None:
    """Write the study's data.

    Raises:
        UserError: data_prep failed, and has printed why.
        StudyStopped: a stop was requested.
    """
    for command in commands.prepare_data(runs):
        logger.info("=== %s", command.description)
        if code := children.run(command.arguments, dict(os.environ)):
            raise UserError(f"data preparation failed with exit code {code}: fix the error that it printed above")


def execute_run(
    commands: StudyCommands,
    run: Run,
    children: ChildProcesses,
    variables: dict[str, str],
    show_output: bool = False,
) -> RunFailure | None:
    """Execute the commands of one run that are not done yet; their output goes to the run's log, or is shown.

    Args:
        variables: added to the environment of the commands.
    Raises:
        StudyStopped: a stop was requested; a later call resumes.
    """
    begin(run)
    log = run.folder / LOG
    with log.open("a", buffering=1) as file:
        output, shown_log = (None, None) if show_output else (file, log)
        for command in commands.for_run(run):
            if command.is_done():
                continue
            print(f"\n=== {command.description}\n$ {shlex.join(command.arguments)}", file=output, flush=True)
            if code := children.run(command.arguments, os.environ | variables, output):
                return RunFailure(run.name, f"{command.description} failed with exit code {code}", shown_log)
            if not command.is_done():
                return RunFailure(run.name, f"{command.description} succeeded but wrote no result", shown_log)
    return None


def execute_runs(
    commands: StudyCommands, runs: list[Run], children: ChildProcesses, jobs: int, gpus: int
) -> list[RunFailure]:
    """Execute all runs that are not done, `jobs` at once. A run that fails does not stop the others.

    Args:
        gpus: number of GPUs to divide among the jobs; 0: divide the CPU cores.
    Raises:
        StudyStopped: a stop was requested.
    """
    done = {run.name for run in runs if commands.is_done(run)}
    waiting = [run for run in runs if run.name not in done]
    failures: dict[str, RunFailure] = {}
    active: dict[Future[RunFailure | None], Run] = {}
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    of_thread = threading.local()
    logger.info("=== %d runs, %d to do, %d at once", len(runs), len(waiting), jobs)

    def initialize() -> None:
        of_thread.variables = _assign_devices(slots.get(), jobs, gpus)

    def execute(run: Run) -> RunFailure | None:
        return execute_run(commands, run, children, of_thread.variables)

    with (
        ProgressBar("runs", len(runs), len(done)) as progress,
        ThreadPoolExecutor(jobs, initializer=initialize) as pool,
    ):
        while waiting or active:
            for run in [run for run in waiting if run.start is None or run.start.export.is_dir()]:
                waiting.remove(run)
                active[pool.submit(execute, run)] = run
            for run in list(waiting):
                start = run.start
                if start is not None and start.name in failures and not start.export.is_dir():
                    waiting.remove(run)
                    failures[run.name] = RunFailure(run.name, f"{start.name}, which it starts from, failed")
                    logger.info("%s", failures[run.name])
            finished, _ = wait(active, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in finished:
                run = active.pop(future)
                if children.stop_requested:
                    continue
                if failure := _failure_of(future, run):
                    failures[run.name] = failure
                    logger.info("%s", failure)
                else:
                    done.add(run.name)
                    logger.info("%s: %s", run.name, _final_loss(run))
                progress.advance({"failed": str(len(failures))})
            if children.stop_requested:
                waiting.clear()
    if children.stop_requested:
        raise StudyStopped
    return list(failures.values())


def _failure_of(future: Future[RunFailure | None], run: Run) -> RunFailure | None:
    try:
        return future.result()
    except UserError as error:
        return RunFailure(run.name, str(error))
    except StudyStopped:  # this run alone, by a signal of its own
        return RunFailure(run.name, "it was stopped and has saved: resume with the same command")


def _assign_devices(slot: int, jobs: int, gpus: int) -> dict[str, str]:
    """Give this thread and its child processes their cores or GPU; return environment variables for the children."""
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        return {"CUDA_VISIBLE_DEVICES": visible.split(",")[slot % gpus]}
    cores = sorted(os.sched_getaffinity(0))
    own = cores[slot::jobs] or [cores[slot % len(cores)]]
    os.sched_setaffinity(0, own)  # 0 is this thread; child processes inherit it
    return {"OMP_NUM_THREADS": str(len(own))}


def _final_loss(run: Run) -> str:
    losses = [line for line in read_metrics(run.folder) if "validation/loss" in line]
    if not losses:
        return "done"
    on, off = (losses[-1][name] for name in ("validation/loss", "validation/loss_memory_off"))
    return f"validation loss {on:.4f}, with the memory off {off:.4f}"
