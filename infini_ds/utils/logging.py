"""Logging: plain messages on the terminal, above a progress bar; with time, level and rank in a run's log file.

Every module logs through `logging.getLogger(__name__)`. Rank 0 shows messages from INFO on, the other ranks from WARNING
on. Tables and other results of a command are printed, and not logged.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

PACKAGES = ("infini_ds", "data_prep")
FILE_FORMAT = "%(asctime)s rank %(rank)s %(levelname)s %(name)s: %(message)s"

# One console for messages and progress bars, so that messages appear above a bar. It looks up sys.stdout at each print.
console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


class _TerminalHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record))
        console.file.flush()


class _AddRank(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = os.environ.get("RANK", "0")
        return True


def setup_logging() -> None:
    """Show this process's messages on the terminal. Calling it again changes nothing."""
    level = logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING
    for name in PACKAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _TerminalHandler) for handler in logger.handlers):
            logger.addHandler(_TerminalHandler())
        logger.setLevel(level)
        logger.propagate = False


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append this process's messages to `path` too, with time, level and rank, while the block runs."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter(FILE_FORMAT))
    handler.addFilter(_AddRank())
    loggers = [logging.getLogger(name) for name in PACKAGES]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
