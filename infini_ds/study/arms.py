"""Arms that train from scratch, side by side: their losses by position, and natural recall by distance."""

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from infini_ds.evaluation.html import table
from infini_ds.evaluation.plots import Axes, plt
from infini_ds.study.conclusions import format_spread, loss
from infini_ds.study.figures import COLORS, legend_handles, plot_band, save
from infini_ds.study.results import Cell, RunResult

OTHER = "other"  # the setting in which the memory is that of another document
Losses = dict[str, float]  # by segment of the row or by distance, in order


def best_of_arms(cells: list[Cell], context_length: int) -> list[Cell]:
    """Return of each arm that starts from no other one the cell with the lowest mean validation loss.

    A cell with fewer seeds than another one of its arm, as of a sweep of learning rates, is left out.
    """
    arms: dict[str, list[tuple[float, Cell]]] = {}
    for cell in cells:
        mean = cell.over_seeds(loss)
        if mean and not cell.run.start_from and cell.run.context_length == context_length:
            arms.setdefault(cell.run.arm, []).append((mean.mean, cell))
    best = []
    for of_arm in arms.values():
        seeds = max(len(cell.results) for _, cell in of_arm)
        best.append(min((pair for pair in of_arm if len(pair[1].results) == seeds), key=lambda pair: pair[0])[1])
    return best


def by_segment(result: RunResult) -> Losses:
    """Return the loss in each segment of the row, by its number; {} if `position` was not evaluated."""
    return dict(_last_losses(result, "position", "loss/segment_"))


def by_distance(result: RunResult) -> Losses:
    """Return the loss of `natural_recall` by segments since the bigram, such as "3-4", and of new ones; or {}."""
    losses = dict(_last_losses(result, "natural_recall", "loss/"))
    losses.pop("remembered", None)  # all distances together
    return {group.removesuffix("_segments"): value for group, value in losses.items()}


def _last_losses(result: RunResult, task: str, prefix: str) -> Iterator[tuple[str, float]]:
    for metric in result.metrics(task):
        value = result.last(task, metric)
        if metric.startswith(prefix) and value is not None:
            yield metric.removeprefix(prefix), value


def quarter(result: RunResult, number: int) -> float | None:
    """Return the mean loss in a quarter of the row, 0 to 3; None for a row of fewer than four segments."""
    losses = list(by_segment(result).values())
    size = len(losses) // 4
    return statistics.fmean(losses[number * size : (number + 1) * size]) if size else None


def swapped_loss(result: RunResult) -> float | None:
    """Return the loss with another document's memory; None where gates that stay closed never read any."""
    swapped = result.last("position", "loss", OTHER)
    return None if swapped == result.last("position", "loss") else swapped


COLUMNS: dict[str, Callable[[RunResult], float | None]] = {
    "loss": lambda result: result.last("position", "loss"),
    "first quarter of the row": lambda result: quarter(result, 0),
    "last quarter": lambda result: quarter(result, 3),
    "new bigrams": lambda result: result.last("natural_recall", "loss/new"),
    "bigrams of earlier segments": lambda result: result.last("natural_recall", "loss/remembered"),
    "loss with another document's memory": swapped_loss,
}


def arms_table(cells: list[Cell]) -> str:
    rows: list[list[object]] = [
        [cell.run.arm, cell.name, len(cell.results), *(format_spread(cell.over_seeds(of)) for of in COLUMNS.values())]
        for cell in cells
    ]
    return table(["arm", "cell", "seeds", *COLUMNS], rows, text_columns=("arm", "cell"))


def plot_arms(cells: list[Cell], file: Path) -> Path | None:
    """Plot each arm's loss less that of the first arm, by position and by distance of a repeated bigram.

    Returns:
        The file; None if no two arms were evaluated alike.
    """
    figure, panels = plt.subplots(1, 2, figsize=(13, 5))
    drawn = [_plot_differences(axes, cells, of) for axes, of in zip(panels, (by_segment, by_distance), strict=True)]
    if not any(drawn):
        plt.close(figure)
        return None
    panels[0].set(xlabel="segment of the row", ylabel=f"loss less that of {cells[0].run.arm} (nats/token)")
    panels[1].set(xlabel="segments since the bigram occurred", title="tokens that complete a bigram")
    panels[0].set_title("all tokens")
    return save(figure, file, "Arms side by side", legend_handles(*panels), foot=0.09)


def _plot_differences(axes: Axes, cells: list[Cell], of: Callable[[RunResult], Losses]) -> bool:
    """Plot the cells that have the same groups as the first one; return whether there are at least two."""
    groups = list(of(cells[0].results[0]))
    alike = [cell for cell in cells if groups and all(list(of(result)) == groups for result in cell.results)]
    if cells[0] not in alike:  # a run of the first arm is not evaluated yet, or otherwise
        return False
    baseline = {group: statistics.fmean(of(result)[group] for result in cells[0].results) for group in groups}
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    for number, cell in enumerate(alike):

        def difference(result: RunResult) -> list[tuple[float, float]]:
            return [(place, of(result)[group] - baseline[group]) for place, group in enumerate(groups)]

        plot_band(axes, cell, difference, color=COLORS[number % len(COLORS)], label=cell.run.arm, marker=".")
    shown = slice(None, None, max(1, len(groups) // 8))
    axes.set_xticks(range(len(groups))[shown], groups[shown])
    return len(alike) > 1
