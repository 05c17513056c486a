"""What was measured for each run of a study, and statistics over the seeds of a grid cell.

Everything here is computed from `results.csv` and `gates.csv` (see results_csv.py), so a reader can repeat it.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

ON, OFF = "on", "off"  # settings of the memory
# The most that Adam can move a gate's beta up to a step: the sum of the gates' learning rates. Task "gates".
MAX_GATE_CHANGE = "max_change"


@dataclass(frozen=True)
class RunInfo:
    """The columns of results.csv that are the same in all rows of a run."""

    run: str  # name
    cell: str  # name of the grid cell: runs that differ by their seed alone
    arm: str
    start_from: str  # name of the run whose exported model it starts from, or ""
    seed: int
    steps: int  # of the complete run
    segment_length: int
    context_length: int  # tokens in a row
    memory_rule: str
    gate_schedule: str  # "constant" or "decayed": the gates' learning rate
    axes: dict[str, str] = field(default_factory=dict)  # further axes of the grid: recipe key -> value

    @property
    def uses_memory(self) -> bool:
        """Whether a row has more than one segment. Otherwise the memory is never read: the model is a plain GPT-Neo."""
        return self.segment_length < self.context_length

    @property
    def axes_text(self) -> str:
        """The further axes, such as "learning_rate 0.001"; "" if there are none."""
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.axes.items())


@dataclass(frozen=True)
class Measurement:
    """The columns of results.csv that one row has for itself."""

    step: int
    tokens: int  # that the weights have seen, including those of the run that this one starts from
    task: str  # "training", "validation", "gates", or a task of the evaluation
    setting: str  # of the memory: "on", "off", or "other" (that of another document)
    metric: str
    value: float
    sha256: str  # of the model's weights, where they are kept


@dataclass(frozen=True)
class RunResult:
    """The measurements of one finished run, and its gate curves: (layer, head) -> [(step, gate)]."""

    run: RunInfo
    measurements: tuple[Measurement, ...]
    gates: dict[tuple[int, int], list[tuple[int, float]]]

    @cached_property
    def _curves(self) -> dict[tuple[str, str, str], dict[int, float]]:
        curves: dict[tuple[str, str, str], dict[int, float]] = {}
        for row in self.measurements:
            curves.setdefault((row.task, row.metric, row.setting), {})[row.step] = row.value
        return curves

    def curve(self, task: str, metric: str, setting: str = ON) -> dict[int, float]:
        """Return step -> value, in the order of the steps; {} if it was not measured."""
        return dict(sorted(self._curves.get((task, metric, setting), {}).items()))

    def last(self, task: str, metric: str, setting: str = ON) -> float | None:
        """Return the value at the last step of the run; None if it was not measured then."""
        return self.curve(task, metric, setting).get(self.run.steps)

    def metrics(self, task: str, setting: str = ON) -> list[str]:
        return [metric for of_task, metric, of_setting in self._curves if (of_task, of_setting) == (task, setting)]

    @cached_property
    def tokens_at(self) -> dict[int, int]:
        return {row.step: row.tokens for row in self.measurements}

    @property
    def tokens(self) -> int:
        return max(self.tokens_at.values())

    @property
    def sha256(self) -> str:
        """Of the exported model."""
        return next(row.sha256 for row in self.measurements if row.step == self.run.steps)

    @property
    def loss(self) -> float | None:
        """The last validation loss."""
        return self._last_validation(ON)

    @property
    def loss_memory_off(self) -> float | None:
        return self._last_validation(OFF)

    def _last_validation(self, setting: str) -> float | None:
        losses = self.curve("validation", "loss", setting)
        return losses[max(losses)] if losses else None

    @property
    def gain(self) -> float | None:
        """By how much the memory lowers the last validation loss."""
        return None if self.loss is None or self.loss_memory_off is None else self.loss_memory_off - self.loss


@dataclass(frozen=True)
class Spread:
    """One figure over the seeds of a cell."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation of single runs; None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def ranges_disjoint(self, other: "Spread") -> bool:
        """Return whether every value of one is below every value of the other."""
        return self.high < other.low or other.high < self.low


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return the spread of the values that are not None; None if all are."""
    measured = tuple(value for value in values if value is not None)
    return Spread(measured) if measured else None


def chance_of_disjoint_ranges(one: int, other: int) -> float:
    """Return how often the ranges of two groups of so many runs are disjoint if both have the same distribution."""
    return 2 / math.comb(one + other, one)


@dataclass(frozen=True)
class Cell:
    """A cell of the grid: one configuration, trained with several seeds."""

    name: str
    results: tuple[RunResult, ...]

    @property
    def run(self) -> RunInfo:
        """The columns of its first run, which differ from the others' by name, seed and start alone."""
        return self.results[0].run

    def over_seeds(self, figure: Callable[[RunResult], float | None]) -> Spread | None:
        return spread(figure(result) for result in self.results)

    def last(self, task: str, metric: str, setting: str = ON) -> Spread | None:
        return self.over_seeds(lambda result: result.last(task, metric, setting))


def group_by_cell(results: list[RunResult]) -> list[Cell]:
    grouped: dict[str, list[RunResult]] = {}
    for result in results:
        grouped.setdefault(result.run.cell, []).append(result)
    return [Cell(name, tuple(of_cell)) for name, of_cell in grouped.items()]


@dataclass(frozen=True)
class GateMovement:
    """How the gates' beta moved in a run, as means over all heads (sigmoid(beta) is the gate).

    net_change: distance between start and end. path_length: sum of the changes between recorded steps, up and down.
    max_change: sum of the gates' learning rates, the most that Adam can move a value. The last two are the
    fractions of the path and of that sum that belong to the first half of the steps.
    """

    net_change: float
    path_length: float
    max_change: float
    first_half_of_path: float
    first_half_of_learning_rate: float


def gate_movement(result: RunResult) -> GateMovement | None:
    """Return None for a run whose memory is never read, because its gates have no gradient."""
    if not result.run.uses_memory or not result.gates:
        return None
    half = result.run.steps // 2
    net_changes, path_lengths, first_halves = [], [], []
    for curve in result.gates.values():
        betas = [(step, math.log(gate / (1 - gate))) for step, gate in curve]
        changes = [(now[0], abs(now[1] - before[1])) for before, now in pairwise(betas)]
        net_changes.append(abs(betas[-1][1] - betas[0][1]))
        path_lengths.append(sum(change for _, change in changes))
        first_halves.append(sum(change for step, change in changes if step <= result.run.steps / 2))
    limits = result.curve("gates", MAX_GATE_CHANGE)
    max_change = limits[result.run.steps]
    return GateMovement(
        net_change=statistics.fmean(net_changes),
        path_length=statistics.fmean(path_lengths),
        max_change=max_change,
        first_half_of_path=sum(first_halves) / sum(path_lengths) if sum(path_lengths) else 0.0,
        first_half_of_learning_rate=limits[half] / max_change if max_change else 0.0,
    )


def gate_movements(cell: Cell) -> list[GateMovement]:
    return [movement for result in cell.results if (movement := gate_movement(result))]
