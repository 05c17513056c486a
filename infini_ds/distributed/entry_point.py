"""The entry point of every script: error messages, exit codes, and what a rank does when another one is lost."""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch

from infini_ds.utils.errors import UserError
from infini_ds.utils.logging import setup_logging

SECONDS_FOR_FIRST_RANK = 5.0  # that the other ranks wait before they print an error
SECONDS_FOR_ROLL_CALL = 3.0


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main()`, and turn its exceptions into messages and exit codes.

    A `UserError` is printed as its sentence, without a stack, with exit code 2; INFINI_DS_TRACEBACK=1 adds the stack.
    An error that all ranks raise is printed once: rank 0 prints it first, and the launcher then ends the other ranks.
    Every other exception keeps its stack. On one of several ranks it ends the process at once; if the cause is another rank
    that is gone, that rank is named.
    """
    setup_logging()
    try:
        main()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank:
            time.sleep(SECONDS_FOR_FIRST_RANK)
        if os.environ.get("INFINI_DS_TRACEBACK") == "1":
            traceback.print_exception(error)
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        abort(error)


def abort(error: Exception) -> NoReturn:
    """Say what is wrong on this rank, and end without waiting for threads and data workers that wait for others."""
    rank = os.environ["RANK"]
    if is_communication_error(error):
        missing = ", ".join(map(str, missing_ranks())) or "another one, which answers again"
        # Without gloo's place in its source, and its advice.
        reason = re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0].splitlines()[0]
        print(
            f"error on rank {rank}: lost contact to rank {missing} ({reason}): see what that rank printed last; the "
            "same command goes on from the last checkpoint",
            file=sys.stderr,
        )
    else:
        print(f"error on rank {rank}:\n{''.join(traceback.format_exception(error))}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def is_communication_error(error: Exception) -> bool:
    """Whether a collective operation failed, for another rank that is gone or too late."""
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)


def missing_ranks() -> list[int]:
    """The ranks that do not answer to a roll call; rank 0 if nobody can hold it."""
    env = os.environ
    patience = timedelta(seconds=SECONDS_FOR_ROLL_CALL)
    try:
        store = torch.distributed.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=patience)
        store.set(f"here/{env['RANK']}", "")
        time.sleep(SECONDS_FOR_ROLL_CALL)
        return [rank for rank in range(int(env["WORLD_SIZE"])) if not store.check([f"here/{rank}"])]
    except torch.distributed.DistError:
        return [0]
