"""The figures of a study's report. Lines are means over seeds; bands reach from the lowest seed to the highest."""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from infini_ds.evaluation.plots import Axes, Figure, plt
from infini_ds.study.conclusions import HEADLINES, TASKS
from infini_ds.study.reference_results import ACCURACIES, GPT_NEO, STEPS
from infini_ds.study.results import OFF, ON, Cell, RunInfo, RunResult

PLAIN_COLOR = "0.45"
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
LINE_STYLES: dict[str, Any] = {"decayed": "-", "constant": (0, (4, 1.5))}
MAX_LAYERS, MAX_HEADS = 6, 8  # panels of gate curves
MEMORY_OFF = "memory off"

Points = list[tuple[float, float]]


def color_by_value(values: list[int]) -> dict[int, str]:
    return {value: COLORS[i % len(COLORS)] for i, value in enumerate(sorted(set(values)))}


def plot_band(axes: Axes, cell: Cell, curve: Callable[[RunResult], Points], **style: Any) -> None:
    """Plot a cell's mean curve and range at the x values where every seed has a point."""
    curves = [dict(curve(result)) for result in cell.results]
    places = sorted(set.intersection(*map(set, curves)))
    if not places:
        return
    columns = [[curve[place] for curve in curves] for place in places]
    (line,) = axes.plot(places, [statistics.fmean(column) for column in columns], **style)
    if len(curves) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def save(figure: Figure, file: Path, title: str, handles: dict[str, Any], columns: int = 6, foot: float = 0.09) -> Path:
    """Save a figure with one legend for all panels, below them."""
    figure.suptitle(title, fontsize=13)
    if handles:
        columns = min(columns, len(handles))
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=columns, fontsize=9)
    figure.tight_layout(rect=(0, foot if handles else 0, 1, 1))
    figure.savefig(file)
    plt.close(figure)
    return file


def legend_handles(*panels: Axes) -> dict[str, Any]:
    """Return label -> handle of all panels, each label once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found


def plot_finetuning(cells: list[Cell], file: Path) -> Path:
    """Plot the study's Figure 4: scores during fine-tuning, by segment length, with the published ones."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 5))
    lengths = [cell.run.segment_length for cell in cells if cell.run.uses_memory]
    colors = color_by_value([*lengths, *ACCURACIES["blimp"]])
    for axes, (task, title) in zip(panels, TASKS.items(), strict=False):
        _plot_published(axes, task, colors)
        for cell in cells:
            color = colors[cell.run.segment_length] if cell.run.uses_memory else PLAIN_COLOR
            plot_band(axes, cell, partial(_scores, task=task), color=color, marker="o", markersize=5)
        axes.set(xlabel="fraction of fine-tuning", ylabel="accuracy", title=title)
        if not any(_scores(result, task) for cell in cells for result in cell.results):
            note = "not measured in this study"
            axes.text(0.5, 0.03, note, transform=axes.transAxes, ha="center", color="0.4", style="italic")
    for cell in cells:
        color, label = PLAIN_COLOR, "plain GPT-Neo"
        if cell.run.uses_memory:
            color, label = colors[cell.run.segment_length], f"segments of {cell.run.segment_length}"
        panels[2].plot([], [], color=color, label=label)
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 3}
        plot_band(panels[2], cell, lambda result: _losses_by_fraction(result, ON), **style)
        if cell.run.uses_memory:
            style = {"color": color, "linestyle": "--", "linewidth": 1}
            plot_band(panels[2], cell, lambda result: _losses_by_fraction(result, OFF), **style)
    panels[2].plot([], [], color="0.3", linestyle="--", linewidth=1, label=MEMORY_OFF)
    panels[2].set(xlabel="fraction of fine-tuning", ylabel="loss (nats/token)", title="validation loss")
    handles = legend_handles(panels[2], panels[0])
    return save(figure, file, "Fine-tuning, by segment length", handles, columns=5, foot=0.14)


def _plot_published(axes: Axes, task: str, colors: dict[int, str]) -> None:
    fractions = [step / STEPS[-1] for step in STEPS]
    style: dict[str, Any] = {
        "linestyle": ":",
        "marker": "o",
        "markerfacecolor": "white",
        "markersize": 4,
        "linewidth": 1.1,
    }
    for segment_length, accuracies in ACCURACIES[task].items():
        label = f"published, {segment_length}"
        axes.plot(fractions, accuracies, color=colors[segment_length], label=label, alpha=0.8, **style)
    axes.axhline(GPT_NEO[task], color="0.6", linewidth=1, linestyle="-.", label="published, plain GPT-Neo")


def _scores(result: RunResult, task: str) -> Points:
    return [(step / result.run.steps, score) for step, score in result.curve(task, HEADLINES[task]).items()]


def _losses_by_fraction(result: RunResult, setting: str) -> Points:
    losses = result.curve("validation", "loss", setting)
    return [(step / result.run.steps, loss) for step, loss in losses.items()]


def plot_gates(cells: list[Cell], by: Callable[[RunInfo], int], unit: str, title: str, file: Path) -> Path:
    """Plot gates over the steps, as in the study's Figures 5 and 6.

    Heads of different seeds do not correspond, so the heads of a layer are ordered by their last gate.

    Args:
        by: the axis that the colors show, context length or segment length; unit: what it counts, such as "rows".
    """
    layers, heads = (max(index) + 1 for index in zip(*cells[0].results[0].gates, strict=True))
    rows, columns = min(layers, MAX_LAYERS), min(heads, MAX_HEADS)
    size = (2.6 * columns + 1, 2.3 * rows + 1.4)
    figure, panels = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    colors = color_by_value([by(cell.run) for cell in cells])
    for layer, row in enumerate(panels):
        for rank, axes in enumerate(row):
            axes.axhline(0.5, color="0.7", linewidth=0.7, zorder=0)
            for cell in sorted(cells, key=lambda cell: (by(cell.run), cell.run.gate_schedule)):
                plot_band(
                    axes,
                    cell,
                    partial(_gates_of_rank, layer=layer, rank=rank),
                    color=colors[by(cell.run)],
                    linestyle=LINE_STYLES[cell.run.gate_schedule],
                    linewidth=1.4,
                    label=f"{unit} of {by(cell.run):,}, {cell.run.gate_schedule} learning rate",
                )
            axes.set_title(f"layer {layer}, {_rank_name(rank, heads)}", fontsize=9)
        row[0].set_ylabel("gate, sigmoid(beta)", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=9)
    return save(figure, file, title, legend_handles(panels[0][0]), columns=2, foot=0.12)


def _gates_of_rank(result: RunResult, layer: int, rank: int) -> Points:
    """Return the gate curve of a layer that ends at this rank, from the lowest up."""
    curves = [curve for (of_layer, _), curve in result.gates.items() if of_layer == layer]
    chosen = sorted(curves, key=lambda curve: curve[-1][1])[rank]
    return [(float(step), gate) for step, gate in chosen]


def _rank_name(rank: int, heads: int) -> str:
    if heads == 1:
        return "only gate"
    return {0: "lowest gate", heads - 1: "highest gate"}.get(rank, f"gate {rank + 1} of {heads}")


def plot_pretraining(panels: dict[str, list[Cell]], file: Path) -> Path:
    """Plot pre-training against fine-tuning: validation loss over all tokens seen, one panel for each title."""
    width = max(8.0, 4.6 * len(panels) + 1)
    figure, row = plt.subplots(1, len(panels), figsize=(width, 5), sharey=True, squeeze=False)
    roles = list(dict.fromkeys(_role(cell) for cells in panels.values() for cell in cells))
    colors = dict(zip(roles, (PLAIN_COLOR, *COLORS) if roles[0].startswith("base") else COLORS, strict=False))
    for axes, (title, cells) in zip(row[0], panels.items(), strict=True):
        for cell in cells:
            style: dict[str, Any] = {"color": colors[_role(cell)], "label": _role(cell), "marker": "o", "markersize": 3}
            plot_band(axes, cell, lambda result: _losses_by_tokens(result, ON), **style)
            if cell.run.uses_memory:
                style = {"color": colors[_role(cell)], "linestyle": "--", "linewidth": 1}
                plot_band(axes, cell, lambda result: _losses_by_tokens(result, OFF), **style)
        axes.set(xlabel="tokens seen (millions)", title=title)
    row[0][0].set_ylabel("validation loss (nats/token)")
    row[0][-1].plot([], [], color="0.3", linestyle="--", linewidth=1, label=MEMORY_OFF)
    # The losses of the first steps would hide the differences at the end.
    results = [result for cells in panels.values() for cell in cells for result in cell.results]
    ends = [loss for result in results for loss in (result.loss, result.loss_memory_off) if loss is not None]
    low, high = min(ends), max(ends)
    row[0][0].set_ylim(low - 0.1 * (high - low + 0.1), high + 1.2 * (high - low + 0.1))
    columns, foot = (2, 0.18) if any(result.run.axes for result in results) else (6, 0.09)  # long labels
    title = "Pre-training with a memory, or adding it by fine-tuning"
    return save(figure, file, title, legend_handles(*row[0]), columns, foot)


def _role(cell: Cell) -> str:
    role = f"{cell.run.arm}, plain" if not cell.run.uses_memory and cell.run.start_from else cell.run.arm
    return f"{role}, {cell.run.axes_text}" if cell.run.axes else role


def _losses_by_tokens(result: RunResult, setting: str) -> Points:
    losses = result.curve("validation", "loss", setting)
    return [(result.tokens_at[step] / 1e6, loss) for step, loss in losses.items()]


def plot_all_cells(cells: list[Cell], file: Path) -> Path:
    """Plot the last validation loss of every cell and seed, with the memory on and off."""
    figure, axes = plt.subplots(figsize=(10, 0.42 * len(cells) + 1.9))
    for row, cell in enumerate(cells):
        for figure_of, color, filled in (
            (lambda result: result.loss_memory_off, "tab:orange", False),
            (lambda result: result.loss, "tab:blue", True),
        ):
            found = cell.over_seeds(figure_of)
            if found is None or (not filled and not cell.run.uses_memory):
                continue
            fill = color if filled else "white"
            axes.plot([found.low, found.high], [row, row], color=color, linewidth=2, alpha=0.4)
            axes.plot(found.values, [row] * len(found.values), "o", color=color, markersize=3.5, alpha=0.6)
            axes.plot([found.mean], [row], "o", color=color, markerfacecolor=fill, markersize=8)
    axes.plot([], [], "o", color="tab:blue", markersize=8, label="memory on")
    axes.plot([], [], "o", color="tab:orange", markerfacecolor="white", markersize=8, label=MEMORY_OFF)
    axes.set_yticks(range(len(cells)), [cell.name for cell in cells], fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="last validation loss (nats/token): mean, single seeds, range")
    return save(figure, file, "All cells of the grid", legend_handles(axes), foot=0.06)


def plot_gain_by_position(cells: list[Cell], file: Path) -> Path | None:
    """Plot by how much the memory lowers the loss, by position in the row; None if `position` was not evaluated."""
    cells = [cell for cell in cells if all(_gain_by_position(result) for result in cell.results)]
    if not cells:
        return None
    lengths = sorted({cell.run.segment_length for cell in cells})
    names = list(dict.fromkeys(_name_without_segment(cell) for cell in cells))
    size = (max(8.0, 4.6 * len(lengths) + 1), 5)
    figure, row = plt.subplots(1, len(lengths), figsize=size, sharey=True, squeeze=False)
    for segment_length, axes in zip(lengths, row[0], strict=True):
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        for cell in cells:
            if cell.run.segment_length == segment_length:
                name = _name_without_segment(cell)
                style = {"color": COLORS[names.index(name) % len(COLORS)], "label": name, "marker": "."}
                plot_band(axes, cell, _gain_by_position, linestyle=LINE_STYLES[cell.run.gate_schedule], **style)
        axes.set(xlabel="position in the row (tokens)", title=f"segments of {segment_length}")
    row[0][0].set_ylabel("loss, memory off minus on (nats/token)")
    return save(figure, file, "Loss reduction by the memory", legend_handles(*row[0]), columns=3, foot=0.14)


def _name_without_segment(cell: Cell) -> str:
    return cell.name.replace(f"-s{cell.run.segment_length}-", "-", 1)


def _gain_by_position(result: RunResult) -> Points:
    points = []
    for metric in result.metrics("position"):
        if metric.startswith("loss/segment_"):
            middle = result.run.segment_length * (int(metric.removeprefix("loss/segment_")) - 0.5)
            on, off = (result.last("position", metric, setting) for setting in (ON, OFF))
            if on is not None and off is not None:
                points.append((middle, off - on))
    return points
