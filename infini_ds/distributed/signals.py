"""Graceful shutdown on signals, or when the launcher ends: all ranks finish the step, save, and exit with code 75.

The signals are blocked in every thread, and in every process that a rank starts, and one thread waits for them. So none
of them can end a data worker or interrupt a call into C, and a second Ctrl-C is received even while a rank waits for
another one. This module imports nothing heavy, so that a script can listen before it imports torch.
"""

import os
import signal
import sys
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
STOPPED_EARLY = os.EX_TEMPFAIL  # 75, the exit code of a run that has saved and can be resumed with the same command
LAUNCHER_GONE = 255  # in place of a signal's number
# Scripts and modules that start ranks and wait for them; deepspeed.launcher.runner starts deepspeed.launcher.launch.
LAUNCHERS = {
    *("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run"),
    *("graceful.py", "quickstart.py", "study.py"),
}
# For the resource tracker: the shared memory of a rank that dies is removed at the next start of the run.
NO_LEAK_WARNING = "ignore::UserWarning:multiprocessing.resource_tracker"
SAME_CTRL_C = 1.0  # seconds in which two SIGINT are one Ctrl-C, sent by the terminal and by a launcher


class GracefulShutdown:
    """Records a request to stop, and whether all ranks have agreed on it.

    Attributes:
        received: number of the first signal that this rank received, LAUNCHER_GONE, or 0.
        agreed: the same for all ranks, once they have exchanged it; 0 as long as training continues.
        can_save: whether steps have been run that a checkpoint would save. Before that a signal ends the process.
    """

    def __init__(self) -> None:
        self.received = 0
        self.agreed = 0
        self.can_save = False

    def listen(self) -> None:
        """Handle signals from now on. To be called in the main thread, before other threads are started."""
        handled = set(SIGNALS)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # how a shell starts a job in the background
            handled.remove(signal.SIGINT)
        # Python starts the resource tracker with the first shared memory, and unblocks SIGINT and SIGTERM in this
        # process then. The tracker ignores those two, but SIGUSR1 would end it: so start it now, with all blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        sys.warnoptions.append(NO_LEAK_WARNING)
        resource_tracker.ensure_running()
        sys.warnoptions.remove(NO_LEAK_WARNING)
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        threading.Thread(target=self._listen, args=(handled, _chain_of_launchers()), daemon=True).start()

    def agree(self, device: "torch.device") -> bool:
        """Return whether any rank has received a signal. Collective: every rank asks at the same point."""
        if not self.agreed:
            import torch
            import torch.distributed as dist

            received = torch.tensor(self.received, device=device)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            self.agreed = int(received)
        return bool(self.agreed)

    @property
    def reason(self) -> str:
        """Why the run stops, such as "SIGTERM"."""
        return _name(self.agreed)

    def _listen(self, handled: set[signal.Signals], chain: list[tuple[psutil.Process, int]]) -> None:
        interrupted_at = None
        while True:
            info = signal.sigtimedwait(handled, 1.0)
            # After SIGSTOP and SIGCONT, CPython returns uninitialized memory if the timeout passed in between.
            if info is None or info.si_signo not in handled:
                if any(_parent(child) != parent for child, parent in chain):
                    self._receive(LAUNCHER_GONE)
                continue
            if info.si_signo == signal.SIGINT:
                if interrupted_at and time.monotonic() - interrupted_at > SAME_CTRL_C:
                    os._exit(128 + signal.SIGINT)
                interrupted_at = interrupted_at or time.monotonic()
            self._receive(info.si_signo)

    def _receive(self, number: int) -> None:
        if self.received:
            return
        self.received = number
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            effect = "the run saves and stops after this step" if self.can_save else "the run had not begun a step"
            again = "; a second Ctrl-C ends it at once" if number == signal.SIGINT and self.can_save else ""
            print(f"{_name(number)}: {effect}{again}", file=sys.stderr, flush=True)
        if not self.can_save:
            os._exit(STOPPED_EARLY)


def _name(number: int) -> str:
    return "the end of the launcher" if number == LAUNCHER_GONE else signal.Signals(number).name


def _chain_of_launchers() -> list[tuple[psutil.Process, int]]:
    """Return this process and the launchers above it, each with its parent as long as that is a launcher.

    SIGTERM to the `deepspeed` command ends it and leaves the ranks running: they notice because the parent of their
    parent changes.
    """
    chain, child = [], psutil.Process()
    try:
        while (parent := child.parent()) and is_launcher(parent.cmdline()):
            chain.append((child, parent.pid))
            child = parent
    except psutil.Error:  # a process of another user
        pass
    return chain


def is_launcher(command: list[str]) -> bool:
    """Return whether a command line is that of a launcher: Python with one of LAUNCHERS as script or module."""
    return (
        bool(command)
        and Path(command[0]).name.startswith("python")
        and any(Path(argument).name in LAUNCHERS for argument in command[1:4])
    )


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None
