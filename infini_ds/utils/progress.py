"""Progress of long work: a bar on a terminal; in a pipe, a log file or under Slurm a line now and then.

    with ProgressBar("training", total=240, start=20) as progress:
        progress.advance({"loss": "3.2041"})                    # training 21/240  loss 3.2041  1:20 left

    with ProgressBar("preparing", unit="tokens") as progress:   # the total is unknown: count and rate
        progress.phase("tokenizing")
        progress.advance({"documents": "12"}, by=4096)          # tokenizing 4,096 tokens  documents 12  9,310 tokens/s

Where they go, stdout or stderr, is set by `utils.logging.setup_logging`.
"""

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

from infini_ds.utils.logging import FILE_ONLY, console

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Shows how much of some work is done, while its `with` block runs. Messages that are logged appear above the bar.

    Lines are logged in either case: to the terminal where it shows no bar, and to a run's log file.

    Args:
        what: name of the work.
        total: number of items, or None if it is unknown.
        start: items that are already done, which do not count for the speed.
        unit: name of the items, shown if the total is unknown.
        shown: False shows nothing and only counts.
    """

    def __init__(self, what: str, total: int | None = None, start: int = 0, unit: str = "items", shown: bool = True):
        self.what, self.total, self.unit, self.done, self._shown = what, total, unit, start, shown
        self._figures: dict[str, str] = {}
        self._restart_clock()
        self._last_line = self._started_at
        self._bar: Progress | None = None
        if shown and console.file.isatty():
            columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")]
            self._bar = Progress(
                *columns,
                console=console,
                transient=total is None,  # a bar of unknown length has no final state worth leaving on the screen
                redirect_stdout=sys.stdout.isatty(),  # what goes to a file stays in the file
                redirect_stderr=sys.stderr.isatty(),
            )
            self._task = self._bar.add_task(what, total=total, completed=start, text="")

    def __enter__(self) -> "ProgressBar":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, figures: Mapping[str, str] | None = None, by: int = 1) -> None:
        """Count `by` more items, and show `figures` beside the count.

        Work that has figures now and then gets a line only with new ones, so that no line shows figures of an earlier
        step. The first figures get one at once, unless the total is unknown: the line would repeat that of `phase`, and
        the speed of a single item is mostly that of the start.
        """
        self.done += by
        first_figures = bool(figures) and not self._figures and self.total is not None
        if figures:
            self._figures = dict(figures)
        self._update_bar()
        if figures or not self._figures:
            self._log_line(at_once=first_figures or self.done == self.total)

    def phase(self, what: str, total: int | None = None) -> None:
        """Begin the next part of the work, under its own name, at 0 of `total` items."""
        self.what, self.total, self.done, self._figures = what, total, 0, {}
        self._restart_clock()
        self._last_line = self._started_at
        if self._bar:
            self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total, text="")
        self._log(what)

    def rewind(self, done: int) -> None:
        """Continue from `done` items, after a rollback."""
        self.done = done
        self._restart_clock()
        self._update_bar()

    def _restart_clock(self) -> None:
        self._started_at, self._start = time.monotonic(), self.done

    def _update_bar(self) -> None:
        if self._bar:
            self._bar.update(self._task, completed=self.done, text=self._numbers())

    def _log_line(self, at_once: bool) -> None:
        now = time.monotonic()
        if at_once or now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._log(f"{self.what} {self._numbers()}")

    def _log(self, line: str) -> None:
        if self._shown:
            logger.info(line, extra=FILE_ONLY if self._bar else None)

    def _numbers(self) -> str:
        """Return the count, the figures, and the time left, or the speed if the total is unknown."""
        figures = [f"{name} {value}" for name, value in self._figures.items()]
        seconds, done = time.monotonic() - self._started_at, self.done - self._start
        if self.total is None:
            if not self.done:
                return ""
            parts = [f"{self.done:,} {self.unit}", *figures, f"{done / max(seconds, 1e-9):,.0f} {self.unit}/s"]
        else:
            minutes, rest = divmod(round(seconds / max(1, done) * (self.total - self.done)), 60)
            parts = [f"{self.done}/{self.total}", *figures, f"{minutes}:{rest:02d} left"]
        return "  ".join(parts)
