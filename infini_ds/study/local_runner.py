"""Runs of a study on this machine, several at once, each on its share of the cores or on a GPU of its own."""

import contextlib
import os
import queue
import signal
import subprocess
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from infini_ds.distributed.signals import STOPPED_EARLY
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.study.commands import begin, data_steps, is_done, run_steps
from infini_ds.study.grid import Run, Study
from infini_ds.utils.errors import UserError
from infini_ds.utils.progress import ProgressBar

LOG = "study.log"


@dataclass(frozen=True)
class Failure:
    """A step that ended with an error, or was not begun for that of another run."""

    run: str
    reason: str
    log: Path | None = None

    def __str__(self) -> str:
        return f"{self.run}: {self.reason}" + (f"; see {self.log}" if self.log else "")


class Stopped(Exception):
    """The study was told to stop."""


class Children:
    """The commands at work. Told to stop, it tells them by SIGTERM: training saves, the others leave nothing half."""

    def __init__(self):
        self.stopping = False
        self._living: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def listen(self) -> None:
        """From now on SIGTERM, SIGUSR1 and Ctrl-C stop the study; a second Ctrl-C kills what is at work."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # how a shell starts a job in the background
                signal.signal(number, self._told)

    def _told(self, number: int, _) -> None:
        if self.stopping and number == signal.SIGINT:
            for process in list(self._living):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        elif not self.stopping:
            self.stopping = True
            for process in list(self._living):
                process.send_signal(signal.SIGTERM)
            name = signal.Signals(number).name
            print(f"{name}: what is at work saves and ends; Ctrl-C once more kills it", flush=True)

    def call(self, command: tuple[str, ...], environment: dict[str, str], log=None) -> int:
        """Run a command to its end; returns its exit code.

        Raises:
            Stopped: before, or since, the study was told to stop.
        """
        with self._lock:  # a signal finds all that were started
            if self.stopping:
                raise Stopped
            # A session of its own, so that a Ctrl-C reaches it once, through us.
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log and subprocess.STDOUT, start_new_session=True
            )
            self._living.add(process)
        if self.stopping:  # told between the question and the start
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        self._living.discard(process)
        if code and (self.stopping or code == STOPPED_EARLY):
            raise Stopped
        return code


def environment(**variables: str) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": root} | variables


def prepare(study: Study, runs: list[Run], children: Children) -> None:
    """The study's data.

    Raises:
        UserError: data_prep said what is wrong.
        Stopped: told to stop.
    """
    for step in data_steps(study, runs):
        print(f"=== {step.what}", flush=True)
        if code := children.call(step.command, environment()):
            raise UserError(f"the data could not be prepared (exit code {code}): mend what data_prep says above")


def make_run(
    study: Study, run: Run, children: Children, variables: dict[str, str], shown: bool = False
) -> Failure | None:
    """Whatever is left to do of one run; its output goes to its log, or is `shown`.

    Raises:
        Stopped: told to stop; what was saved is gone on with.
    """
    begin(run)
    log = run.folder / LOG
    with log.open("a", buffering=1) as file:
        for step in run_steps(study, run):
            if step.is_done():
                continue
            print(f"\n=== {step.what}\n$ {' '.join(step.command)}", file=None if shown else file, flush=True)
            if code := children.call(step.command, environment(**variables), None if shown else file):
                return Failure(run.name, f"{step.what} ended with exit code {code}", None if shown else log)
            if not step.is_done():
                return Failure(run.name, f"{step.what} ended well, but without its result", None if shown else log)
    return None


def make_all(study: Study, runs: list[Run], children: Children, jobs: int, gpus: int) -> list[Failure]:
    """Whatever is left to do of all runs, `jobs` at once; a run that fails leaves the others alone.

    Raises:
        Stopped: told to stop.
    """
    done = {run.name for run in runs if is_done(study, run)}
    left = [run for run in runs if run.name not in done]
    failures: dict[str, Failure] = {}
    at_work: dict[Future, Run] = {}
    places: queue.SimpleQueue = queue.SimpleQueue()
    for place in range(jobs):
        places.put(place)
    place = threading.local()
    print(f"=== {len(runs)} runs, {len(left)} to do, {jobs} at once", flush=True)
    with (
        ProgressBar("runs", len(runs), len(done)) as progress,
        ThreadPoolExecutor(jobs, initializer=lambda: _settle(place, places.get(), jobs, gpus)) as pool,
    ):
        while left or at_work:
            for run in [run for run in left if run.start is None or run.start.export.is_dir()]:
                left.remove(run)
                future = pool.submit(lambda run=run: make_run(study, run, children, place.variables))
                at_work[future] = run
            for run in [run for run in left if run.start.name in failures and not run.start.export.is_dir()]:
                left.remove(run)
                failures[run.name] = Failure(run.name, f"{run.start.name}, which it starts from, failed")
                progress.say(str(failures[run.name]))
            finished, _ = wait(at_work, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in finished:
                run = at_work.pop(future)
                if children.stopping:
                    continue
                try:
                    failure = future.result()
                except UserError as error:
                    failure = Failure(run.name, str(error))
                except Stopped:  # it alone
                    failure = Failure(run.name, "it was stopped, and saved: the same command goes on with it")
                if failure:
                    failures[run.name] = failure
                    progress.say(str(failure))
                else:
                    done.add(run.name)
                    progress.say(f"{run.name}: {_reached(run)}")
                progress.advance({"failed": str(len(failures))})
            if children.stopping:
                left.clear()
    if children.stopping:
        raise Stopped
    return list(failures.values())


def _settle(place: threading.local, number: int, jobs: int, gpus: int) -> None:
    """Give this thread, and so all that it starts, its cores or its GPU."""
    place.variables = {}
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        place.variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % gpus]
        return
    cores = sorted(os.sched_getaffinity(0))
    own = cores[number::jobs] or [cores[number % len(cores)]]
    os.sched_setaffinity(0, own)  # of this thread alone; scripts make as many threads as they have cores
    place.variables["OMP_NUM_THREADS"] = str(len(own))


def _reached(run: Run) -> str:
    losses = [line for line in read_metrics(run.folder) if "validation/loss" in line]
    if not losses:
        return "done"
    loss, without = (losses[-1][name] for name in ("validation/loss", "validation/loss_memory_off"))
    return f"validation loss {loss:.4f}, with the memory switched off {without:.4f}"
