"""Being told to stop: by a signal, or by the death of the launcher. All ranks finish the step, save, and end with 75.

The signals are blocked in every thread, and in every process that a rank starts, and one thread waits for them. So
none of them can end a data worker or break off a call into C, and a second Ctrl-C is heard even while a rank waits for
another one. This module imports nothing heavy: a script listens before it imports torch.
"""

import os
import signal
import sys
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path

import psutil

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
STOPPED_EARLY = os.EX_TEMPFAIL  # 75, the exit code of a run that has saved and is to be started again
LAUNCHER_GONE = 255  # in place of a signal's number
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "graceful.py", "quickstart.py", "study.py")
# For that process, of the shared memory that a rank which dies leaves: the next start of the run removes it.
NO_LIST = "ignore::UserWarning:multiprocessing.resource_tracker"
SAME_KEY = 1.0  # seconds in which two SIGINT are one Ctrl-C, which the terminal and a launcher passed on


class GracefulShutdown:
    """Whether this rank was told to stop, and whether all ranks have agreed on it."""

    def __init__(self):
        self.told = 0  # number of the signal that this rank got, or LAUNCHER_GONE
        self.agreed = 0  # the same, as all ranks know it
        self.at_work = False  # there are steps to save

    def listen(self) -> None:
        """From now on signals stop the run in good order; the main thread has to call it before there are others."""
        ours = set(SIGNALS)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # how a shell starts a job in the background
            ours.remove(signal.SIGINT)
        # Python starts this process with the first shared memory, and then unblocks SIGINT and SIGTERM here. It ignores
        # those two itself; SIGUSR1 would end it.
        signal.pthread_sigmask(signal.SIG_BLOCK, ours)
        sys.warnoptions.append(NO_LIST)
        resource_tracker.ensure_running()
        sys.warnoptions.remove(NO_LIST)
        signal.pthread_sigmask(signal.SIG_BLOCK, ours)
        threading.Thread(target=self._listen, args=(ours, _chain_of_launchers()), daemon=True).start()

    def agree(self, device) -> bool:
        """Whether any rank was told to stop; every rank has to ask at the same place."""
        if not self.agreed:
            import torch
            import torch.distributed as dist

            told = torch.tensor(self.told, device=device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            self.agreed = int(told)
        return bool(self.agreed)

    @property
    def reason(self) -> str:
        return _name(self.agreed)

    def _listen(self, ours: set[signal.Signals], chain: list[tuple[psutil.Process, int]]) -> None:
        interrupted_at = None
        while True:
            info = signal.sigtimedwait(ours, 1.0)
            if info is None:
                if any(_parent(child) != parent for child, parent in chain):
                    self._tell(LAUNCHER_GONE)
                continue
            if info.si_signo == signal.SIGINT:
                if interrupted_at and time.monotonic() - interrupted_at > SAME_KEY:
                    os._exit(128 + signal.SIGINT)
                interrupted_at = interrupted_at or time.monotonic()
            self._tell(info.si_signo)

    def _tell(self, number: int) -> None:
        if self.told:
            return
        self.told = number
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            effect = "the run stops behind this step and saves" if self.at_work else "the run had not begun a step"
            again = "; Ctrl-C once more ends it at once" if number == signal.SIGINT and self.at_work else ""
            print(f"{_name(number)}: {effect}{again}", file=sys.stderr, flush=True)
        if not self.at_work:
            os._exit(STOPPED_EARLY)


def _name(number: int) -> str:
    return "the end of the launcher" if number == LAUNCHER_GONE else signal.Signals(number).name


def _chain_of_launchers() -> list[tuple[psutil.Process, int]]:
    """This process and the launchers above it, each with its parent as long as that is a launcher.

    SIGTERM to the `deepspeed` command ends it and leaves the ranks: they see it by the parent of their parent.
    """
    chain, child = [], psutil.Process()
    try:
        while (parent := child.parent()) and _is_launcher(parent.cmdline()):
            chain.append((child, parent.pid))
            child = parent
    except psutil.Error:  # not ours to look at
        pass
    return chain


def _is_launcher(command: list[str]) -> bool:
    return (
        bool(command)
        and Path(command[0]).name.startswith("python")
        and any(name in argument for argument in command[1:4] for name in LAUNCHERS)
    )


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None
