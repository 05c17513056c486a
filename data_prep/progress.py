"""What the user sees while it runs: a bar on a terminal, a plain line now and then elsewhere (a log file, Slurm)."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10


@contextmanager
def show_progress(quiet: bool) -> "Iterator[Progress]":
    """Progress on stderr while the block runs; `quiet` shows nothing."""
    bar = None if quiet or not sys.stderr.isatty() else make_bar()
    if bar is None:
        yield Progress(quiet, None)
    else:
        with bar:
            yield Progress(quiet, bar)


class Progress:
    """Counts documents and tokens; made by `show_progress`."""

    def __init__(self, quiet: bool, bar):
        self.quiet, self.bar = quiet, bar
        self.task = None if bar is None else bar.add_task("", total=None)
        self.documents = self.tokens = 0
        self.phase_name = ""
        self.begun = self.shown = 0.0

    def phase(self, name: str) -> None:
        """Begins a phase, such as "tokenizing"."""
        self.phase_name, self.begun, self.shown = name, time.monotonic(), 0.0
        self._show()

    def advance(self, documents: int, tokens: int) -> None:
        self.documents += documents
        self.tokens += tokens
        if self.bar is not None or time.monotonic() - self.shown > SECONDS_BETWEEN_LINES:
            self._show()

    def _show(self) -> None:
        self.shown = now = time.monotonic()
        line = self.phase_name
        if self.tokens:
            rate = self.tokens / max(now - self.begun, 1e-9)
            line += f": {self.documents:,} documents, {self.tokens:,} tokens, {rate:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, description=line)
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)


def make_bar():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # No total: a lazy source does not know its length.
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
