"""A launcher that a signal to stop does not reach, so that it waits for its ranks and passes on their exit code."""

import signal
import subprocess
import threading

import psutil

from infini_ds.distributed.signals import SIGNALS


def run_graceful(command: list[str], environment: dict[str, str] | None = None) -> int:
    """Run `command`, a launcher of ranks that listen by `GracefulShutdown`; returns its exit code, as a shell would give it.

    By themselves `deepspeed` and `torchrun` die of the signals, or kill ranks that take longer than 30 seconds. A
    blocked signal stays blocked in the processes that a process starts, so only the ranks take theirs. What reaches
    this process alone is passed on to all below it; a Ctrl-C has reached them already, and ranks take two within a
    second for one.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    process = subprocess.Popen(command, env=environment)

    def pass_on() -> None:
        while True:
            number = signal.sigwait(SIGNALS)
            for below in psutil.Process().children(recursive=True):
                try:
                    below.send_signal(number)
                except psutil.NoSuchProcess:
                    continue

    threading.Thread(target=pass_on, daemon=True).start()
    code = process.wait()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 128 - code if code < 0 else code
