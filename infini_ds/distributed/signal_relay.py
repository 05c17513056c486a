"""Run a launcher that ignores the signals to stop, and relay them to its ranks."""

import contextlib
import signal
import subprocess
from collections.abc import Mapping, Sequence

import psutil

from infini_ds.distributed.signals import SIGNALS

SECONDS = 0.2  # between two looks whether the launcher has ended


def run_graceful(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run `command`, a launcher of ranks that use `GracefulShutdown`; return its exit code as a shell would give it.

    By themselves `deepspeed` and `torchrun` die of the signals, or kill ranks that take longer than 30 seconds. A
    process inherits the signals that its parent blocks, so the launcher receives none, while the ranks wait for theirs.
    A signal that reaches this process alone is relayed to all of its descendants. A Ctrl-C has reached them already;
    ranks take two within a second for one.

    Raises:
        FileNotFoundError: the command does not exist.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None:
            if received := signal.sigtimedwait(SIGNALS, SECONDS):
                _send_to_descendants(received.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def _send_to_descendants(number: int) -> None:
    for descendant in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            descendant.send_signal(number)
