"""How data worker processes treat signals and messages."""

import os
import signal
import threading

from infini_ds.utils.logging import use_new_console


def init_worker(_worker: int) -> None:
    """Prepare a data worker: it ends on a SIGTERM of the rank that started it, and ignores all other signals to stop.

    A launcher, Slurm and a terminal send their signal to every process of a run, but a rank needs its workers until it
    has finished its step. For `DataLoader(worker_init_fn=...)`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})

    def wait_for_rank() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait_for_rank, daemon=True).start()
    use_new_console()
