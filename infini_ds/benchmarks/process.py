"""Run one measurement in a process of its own, so that nothing of another one affects its speed or its memory."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import Any

from infini_ds.utils.errors import UserError

USER_ERROR = 2  # the worker's exit code for a UserError
KILLED = -signal.SIGKILL  # return code of a process that the system killed, as it does when memory runs out
OUT_OF_MEMORY = {"out_of_memory": True}  # what a worker prints if memory ran out


def run_worker(
    kind: str, case: dict[str, Any], seconds: float | None = None, hide_gpus: bool = False
) -> dict[str, Any]:
    """Run `infini_ds.benchmarks.worker` and return the JSON object that it printed; OUT_OF_MEMORY if it was killed.

    Args:
        kind, case: what to measure, see the worker's `MEASURES`.
        seconds: after which the worker and all that it started are killed; None: no limit.
        hide_gpus: measure the CPU even if there are GPUs.
    Raises:
        TimeoutError: the time is over.
        UserError: the case is not possible here, such as a model whose package is not installed.
        RuntimeError: the worker failed; the message has its output.
    """
    command = [sys.executable, "-m", "infini_ds.benchmarks.worker", kind, json.dumps(case)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # transformers may look there for a kernel that is missing here
    if hide_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    # A session of its own, since a compiler starts further processes, which would hold the GPU's memory.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as worker:
        try:
            output, errors = worker.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"not done after {seconds:.0f} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
    if worker.returncode == KILLED:
        return OUT_OF_MEMORY
    if worker.returncode == USER_ERROR:
        raise UserError(errors.strip().splitlines()[-1].removeprefix("error: "))
    if worker.returncode:
        raise RuntimeError(f"failed with exit code {worker.returncode}:\n{errors.strip()}")
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result
