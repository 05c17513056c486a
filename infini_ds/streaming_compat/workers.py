"""What a data worker does about the signals that tell a whole run to stop."""

import os
import signal
import threading


def end_with_rank_only(_worker: int) -> None:
    """For `worker_init_fn`: deaf to all but a SIGTERM of the rank that started this worker.

    A launcher, Slurm and a terminal send their signal to every process of the run, and a rank needs its workers until
    it has finished its step.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
