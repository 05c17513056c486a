"""The entry point of every script: error messages, exit codes, and what a rank prints when another one is lost."""

import errno
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import psutil
import torch

from infini_ds.utils.errors import UserError
from infini_ds.utils.logging import setup_logging

SECONDS_FOR_RANK_ZERO = (5.0, 30.0)  # at least and at most, for which the other ranks wait before they print an error
SECONDS_FOR_ROLL_CALL = 3.0
STDOUT_CLOSED = 141  # 128 + SIGPIPE
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main()`, and turn its exceptions into messages and exit codes.

    A `UserError` is printed as its sentence, without a stack, with exit code 2; INFINI_DS_TRACEBACK=1 adds the stack.
    If all ranks raise it, rank 0 prints it first, and the launcher then ends the other ranks. A full disk, which any
    file may meet, is such an error too.
    Every other exception keeps its stack, with exit code 1. On one of several ranks it ends the process at once; if the
    cause is a rank that is gone, that rank is named instead.
    If the program that reads stdout has ended, as `head` does, so does this process, with a shell's exit code for it.
    """
    setup_logging()
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserError as error:
        _exit_with_sentence(error, str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and stdout_has_no_reader():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
            sys.exit(STDOUT_CLOSED)
        if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
            _exit_with_sentence(error, f"the disk is full ({error}): free some space, then give the same command again")
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        abort(error)


def _exit_with_sentence(error: Exception, sentence: str) -> NoReturn:
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(seconds_for_rank_zero(psutil.Process().create_time()))
    if os.environ.get("INFINI_DS_TRACEBACK") == "1":
        traceback.print_exception(error)
    print(f"error: {sentence}" if rank == 0 else f"error on rank {rank}: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)


def seconds_for_rank_zero(started: float) -> float:
    """Return how long a rank that was started at a time of the clock lets rank 0 print the error first.

    As long as it took to get here: on a busy machine ranks start at different speeds, and the launcher ends all of them
    with the first that ends, which must not be before rank 0 has printed.
    """
    at_least, at_most = SECONDS_FOR_RANK_ZERO
    return at_least + min(max(time.time() - started, 0.0), at_most - at_least)


def stdout_has_no_reader() -> bool:
    """Return whether stdout is a pipe whose other end is closed."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError):  # closed, or not a file
        return False
    poll = select.poll()
    poll.register(output, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def abort(error: Exception) -> NoReturn:
    """Print this rank's error and exit with code 1, without joining threads and workers that may wait for others."""
    rank = os.environ["RANK"]
    if is_communication_error(error):
        missing = ", ".join(map(str, missing_ranks())) or "another one, which answers again"
        # Without the line of gloo's source that the message begins with, and the advice that it ends with.
        reason = re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0].splitlines()[0]
        print(
            f"error on rank {rank}: lost contact with rank {missing} ({reason}): see what that rank printed last; the "
            "same command resumes from the last checkpoint",
            file=sys.stderr,
        )
    else:
        print(f"error on rank {rank}:\n{''.join(traceback.format_exception(error))}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def is_communication_error(error: Exception) -> bool:
    """Return whether a collective failed because another rank is gone or did not join it in time."""
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)


def missing_ranks() -> list[int]:
    """Return the ranks that do not answer a roll call on the store of rank 0; rank 0 itself if the store is gone."""
    env = os.environ
    timeout = timedelta(seconds=SECONDS_FOR_ROLL_CALL)
    try:
        store = torch.distributed.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=timeout)
        store.set(f"present/{env['RANK']}", "")
        time.sleep(SECONDS_FOR_ROLL_CALL)
        return [rank for rank in range(int(env["WORLD_SIZE"])) if not store.check([f"present/{rank}"])]
    except torch.distributed.DistError:
        return [0]
