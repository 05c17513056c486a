"""Progress of long work: a bar on a terminal, plain lines now and then in a log file or under Slurm."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # seconds between plain lines


class ProgressBar:
    """`with ProgressBar("training", total, start) as bar: bar.advance({"loss": 3.2})`; silent if not `shown`."""

    def __init__(self, what: str, total: int, start: int = 0, shown: bool = True):
        self.what, self.total, self.done, self.shown = what, total, start, shown
        self._started_at, self._start = time.monotonic(), start
        self._last_line = 0.0
        self._bar = None
        if shown and sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console())
            self._task = self._bar.add_task(what, total=total, completed=start, text="")

    def __enter__(self) -> "ProgressBar":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, figures: dict[str, str] | None = None) -> None:
        self.done += 1
        text = "  ".join(f"{name} {value}" for name, value in (figures or {}).items())
        if self._bar:
            self._bar.update(self._task, completed=self.done, **({"text": text} if figures else {}))
        elif self.shown and figures and (self.done == self.total or time.monotonic() - self._last_line > LINE_EVERY):
            self._last_line = time.monotonic()
            self.say(f"{self.what} {self.done}/{self.total}  {text}  {self._time_left()} left")

    def go_back(self, done: int) -> None:
        """Count on from `done`."""
        self.done = self._start = done
        self._started_at = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=done)

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if not self.shown:
            return
        if self._bar:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def _time_left(self) -> str:
        each = (time.monotonic() - self._started_at) / max(1, self.done - self._start)
        minutes, seconds = divmod(round(each * (self.total - self.done)), 60)
        return f"{minutes}:{seconds:02d}"
