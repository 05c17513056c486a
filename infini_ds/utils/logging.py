"""Logging: plain messages on the terminal, above a progress bar; with time, level and rank in a run's log file.

Every module logs through `logging.getLogger(__name__)`. Rank 0 shows messages from INFO on, the other ranks from
WARNING on. Tables and other results of a command are printed, and not logged.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from infini_ds.utils.errors import UserError

PACKAGES = ("infini_ds", "data_prep")
FILE_FORMAT = "%(asctime)s rank %(rank)s %(levelname)s %(name)s: %(message)s"
FILE_ONLY = {"file_only": True}  # logger.info(sentence, extra=FILE_ONLY): for the log file, as the terminal has a bar


def _new_console() -> Console:
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


# One console for messages and progress bars, so that messages appear above a bar. It looks up its stream at each print.
console = _new_console()


class _TerminalHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "file_only", False):
            console.print(self.format(record))
            console.file.flush()


class _RankFilter(logging.Filter):
    """Adds the rank to a record, and drops what is below WARNING on other ranks than 0."""

    def filter(self, record: logging.LogRecord) -> bool:
        # Looked up at each message, since a process may log before the environment of Slurm's tasks is completed.
        rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
        record.rank = rank
        return rank == 0 or record.levelno >= logging.WARNING


def setup_logging(stderr: bool = False) -> None:
    """Show this process's messages and progress bars on stdout, or on stderr. May be called again."""
    console.stderr = stderr
    for name in PACKAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _TerminalHandler) for handler in logger.handlers):
            handler = _TerminalHandler()
            handler.addFilter(_RankFilter())
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def use_new_console() -> None:
    """Let this process, a fork, print its messages without the progress bar and the lock that it copied."""
    global console
    stderr, console = console.stderr, _new_console()
    console.stderr = stderr


class _LogFile(logging.FileHandler):
    """A file that loses messages while its disk is full. They are on the terminal too, and do not end a run."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append this process's messages to `path` too, with time, level and rank, while the block runs.

    An exception that ends the block is logged there: a UserError as its sentence, any other one with its stack.
    """
    handler = _LogFile(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter(FILE_FORMAT))
    handler.addFilter(_RankFilter())
    loggers = [logging.getLogger(name) for name in PACKAGES]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    except UserError as error:
        loggers[0].error(str(error), extra=FILE_ONLY)
        raise
    except Exception:
        loggers[0].exception("the run failed", extra=FILE_ONLY)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
