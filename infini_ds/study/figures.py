"""The pictures of a study. Lines are means over seeds, bands reach from the lowest seed to the highest."""

import statistics
from collections.abc import Callable
from pathlib import Path

from infini_ds.evaluation.plots import plt
from infini_ds.study.reference_results import FIGURES, GPT_NEO, STEPS
from infini_ds.study.results import Cell, Result

PLAIN = "0.45"
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
DASHES = {"decayed": "-", "constant": (0, (4, 1.5))}
LAYERS, HEADS = 6, 8  # panels of gates, at most
Points = list[tuple[float, float]]


def colors(values: list[int]) -> dict[int, str]:
    return {value: COLORS[i % len(COLORS)] for i, value in enumerate(sorted(set(values)))}


def band(axes, cell: Cell, curve: Callable[[Result], Points], **style) -> None:
    """A cell's curve, at the places where every seed has a point."""
    curves = [dict(curve(result)) for result in cell.results]
    places = sorted(set.intersection(*map(set, curves)))
    if not places:
        return
    columns = [[curve[place] for curve in curves] for place in places]
    (line,) = axes.plot(places, [statistics.fmean(column) for column in columns], **style)
    if len(curves) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def finish(figure, file: Path, title: str, handles: dict, columns: int = 6, foot: float = 0.09) -> Path:
    """One legend for all panels, below them."""
    figure.suptitle(title, fontsize=13)
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="lower center", ncols=min(columns, len(handles)), fontsize=9
        )
    figure.tight_layout(rect=(0, foot if handles else 0, 1, 1))
    figure.savefig(file)
    plt.close(figure)
    return file


def handles_of(*axes) -> dict:
    """Each label once."""
    found = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found


def along_finetuning(cells: list[Cell], file: Path) -> Path:
    """The study's Figure 4: BLiMP and (Super)GLUE along fine-tuning, by segment length, beside the published ones."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 5), gridspec_kw={"width_ratios": [1, 1, 1]})
    shades = colors([*(cell.run.segment_length for cell in cells if not cell.run.is_plain), *FIGURES["blimp"]])
    for axes, (task, title) in zip(panels, (("blimp", "BLiMP"), ("glue", "(Super)GLUE")), strict=False):
        measured = False
        for S, accuracies in FIGURES[task].items():
            share = [step / STEPS[-1] for step in STEPS]
            style = {"color": shades[S], "linestyle": ":", "marker": "o", "markerfacecolor": "white", "markersize": 4}
            axes.plot(share, accuracies, linewidth=1.1, label=f"published, {S}", alpha=0.8, **style)
        axes.axhline(GPT_NEO[task], color="0.6", linewidth=1, linestyle="-.", label="published, plain GPT-Neo")
        for cell in cells:
            measured |= any(
                result.score(task, step) is not None for result in cell.results for step in result.evaluations
            )
            style = {"color": PLAIN} if cell.run.is_plain else {"color": shades[cell.run.segment_length]}
            band(axes, cell, lambda result, task=task: _scores(result, task), marker="o", markersize=5, **style)
        axes.set(xlabel="share of fine-tuning", ylabel="accuracy", title=title)
        if not measured:
            axes.text(
                0.5, 0.03, "not measured here", transform=axes.transAxes, ha="center", color="0.4", style="italic"
            )
    for cell in cells:
        plain = cell.run.is_plain
        color, label = (PLAIN, "plain GPT-Neo") if plain else (shades[cell.run.segment_length], _segments(cell))
        panels[2].plot([], [], color=color, label=label)
        band(panels[2], cell, lambda result: _losses(result, 0), color=color, marker="o", markersize=3)
        if not plain:
            band(panels[2], cell, lambda result: _losses(result, 1), color=color, linestyle="--", linewidth=1)
    panels[2].plot([], [], color="0.3", linestyle="--", linewidth=1, label="memory switched off")
    panels[2].set(xlabel="share of fine-tuning", ylabel="loss (nats a token)", title="validation loss")
    handles = handles_of(panels[2], panels[0])
    return finish(figure, file, "Along fine-tuning, by segment length", handles, columns=5, foot=0.14)


def _segments(cell: Cell) -> str:
    return f"segments of {cell.run.segment_length}"


def _scores(result: Result, task: str) -> Points:
    return [(step / result.run.recipe.steps, result.score(task, step)) for step in result.steps_with(task)]


def _losses(result: Result, which: int) -> Points:
    return [(step / result.run.recipe.steps, losses[which]) for step, losses in sorted(result.validation.items())]


def gates(cells: list[Cell], by: str, title: str, file: Path) -> Path:
    """The study's Figures 5 and 6: gates over the steps, by `context_length` or `segment_length`.

    Heads of different seeds have nothing in common, so those of a layer stand in the order of their last gate.
    """
    layers, heads = (max(index) + 1 for index in zip(*cells[0].results[0].gates, strict=True))
    rows, columns = min(layers, LAYERS), min(heads, HEADS)
    size = (2.6 * columns + 1, 2.3 * rows + 1.4)
    figure, panels = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    word = "rows" if by == "context_length" else "segments"
    shades = colors([getattr(cell.run, by) for cell in cells])
    for layer, row in enumerate(panels):
        for place, axes in enumerate(row):
            axes.axhline(0.5, color="0.7", linewidth=0.7, zorder=0)
            for cell in sorted(cells, key=lambda cell: (getattr(cell.run, by), cell.run.gates)):
                value = getattr(cell.run, by)
                label = f"{word} of {value:,}, {cell.run.gates} learning rate"
                style = {"color": shades[value], "linestyle": DASHES[cell.run.gates], "linewidth": 1.4, "label": label}
                band(axes, cell, lambda result, layer=layer, place=place: _ranked(result, layer)[place], **style)
            axes.set_title(f"layer {layer}, {_place(place, heads)} gate", fontsize=9)
        row[0].set_ylabel("share of the memory", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=9)
    return finish(figure, file, title, handles_of(panels[0][0]), columns=2, foot=0.12)


def _ranked(result: Result, layer: int) -> list[Points]:
    """The gates of a layer, from the one that ends lowest to the one that ends highest."""
    return sorted((curve for (of, _), curve in result.gates.items() if of == layer), key=lambda curve: curve[-1][1])


def _place(place: int, heads: int) -> str:
    if heads == 1:
        return "only"
    return {0: "lowest", heads - 1: "highest"}.get(place, f"{place + 1} of {heads}")


def by_tokens(panels: dict[str, list[Cell]], file: Path) -> Path:
    """Pre-training against fine-tuning: validation loss over all tokens seen, a panel for each title."""
    width = max(8.0, 4.6 * len(panels) + 1)
    figure, row = plt.subplots(1, len(panels), figsize=(width, 5), sharey=True, squeeze=False)
    arms = list(dict.fromkeys(_role(cell) for cells in panels.values() for cell in cells))
    shades = dict(zip(arms, ("0.45", *COLORS) if "base" in arms else COLORS, strict=False))
    for axes, (title, cells) in zip(row[0], panels.items(), strict=True):
        for cell in cells:
            role = _role(cell)
            style = {"color": shades[role], "label": role, "marker": "o", "markersize": 3}
            band(axes, cell, lambda result: _over_tokens(result, 0), **style)
            if not cell.run.is_plain:
                off = {"color": shades[role], "linestyle": "--", "linewidth": 1}
                band(axes, cell, lambda result: _over_tokens(result, 1), **off)
        axes.set(xlabel="tokens seen (millions)", title=title)
    row[0][0].set_ylabel("validation loss (nats a token)")
    axes.plot([], [], color="0.3", linestyle="--", linewidth=1, label="memory switched off")
    # The first losses, of a model that knows nothing, would leave no room for the differences.
    ends = [loss for cells in panels.values() for cell in cells for r in cell.results for loss in _end_losses(r)]
    low, high = min(ends), max(ends)
    row[0][0].set_ylim(low - 0.1 * (high - low + 0.1), high + 1.2 * (high - low + 0.1))
    return finish(figure, file, "Pre-training with a memory, or adding it by fine-tuning", handles_of(*row[0]))


def _role(cell: Cell) -> str:
    return f"{cell.run.arm}, plain" if cell.run.is_plain and cell.run.start else cell.run.arm


def _over_tokens(result: Result, which: int) -> Points:
    before = result.start.tokens if result.start else 0
    points = sorted(result.validation.items())
    return [((before + step * result.step_tokens) / 1e6, losses[which]) for step, losses in points]


def _end_losses(result: Result) -> list[float]:
    return [result.loss, result.loss_memory_off] if result.validation else []


def all_cells(cells: list[Cell], file: Path) -> Path:
    """Every cell and every seed: the last validation loss, with the memory and without."""
    figure, axes = plt.subplots(figsize=(10, 0.42 * len(cells) + 1.9))
    for row, cell in enumerate(cells):
        for figure_of, color, filled in (
            (lambda result: result.loss_memory_off, "tab:orange", False),
            (lambda result: result.loss, "tab:blue", True),
        ):
            found = cell.over_seeds(figure_of)
            if found is None or (not filled and cell.run.is_plain):
                continue
            fill = color if filled else "white"
            axes.plot([found.low, found.high], [row, row], color=color, linewidth=2, alpha=0.4)
            axes.plot(found.values, [row] * len(found.values), "o", color=color, markersize=3.5, alpha=0.6)
            axes.plot([found.mean], [row], "o", color=color, markerfacecolor=fill, markersize=8)
    axes.plot([], [], "o", color="tab:blue", markersize=8, label="with the memory")
    axes.plot([], [], "o", color="tab:orange", markerfacecolor="white", markersize=8, label="memory switched off")
    axes.set_yticks(range(len(cells)), [cell.name for cell in cells], fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="last validation loss (nats a token): mean, seeds, range")
    return finish(figure, file, "Every cell of the grid", handles_of(axes), foot=0.06)


def gain_by_segment(cells: list[Cell], file: Path) -> Path | None:
    """How much loss the memory saves, by position in the row; None where `position` was not evaluated."""
    cells = [cell for cell in cells if all(_gain(result) for result in cell.results)]
    if not cells:
        return None
    lengths = sorted({cell.run.segment_length for cell in cells})
    ways = list(dict.fromkeys(_way(cell) for cell in cells))
    size = (max(8.0, 4.6 * len(lengths) + 1), 5)
    figure, row = plt.subplots(1, len(lengths), figsize=size, sharey=True, squeeze=False)
    for S, axes in zip(lengths, row[0], strict=True):
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        for cell in cells:
            if cell.run.segment_length == S:
                style = {"color": COLORS[ways.index(_way(cell)) % len(COLORS)], "linestyle": DASHES[cell.run.gates]}
                band(axes, cell, _gain, label=_way(cell), marker=".", **style)
        axes.set(xlabel="position in the row (tokens)", title=f"segments of {S}")
    row[0][0].set_ylabel("loss without memory - loss with it (nats)")
    return finish(figure, file, "What the memory saves", handles_of(*row[0]), columns=3, foot=0.14)


def _way(cell: Cell) -> str:
    """The name of a cell without its segment length."""
    return cell.name.replace(f"-s{cell.run.segment_length}-", "-", 1)


def _gain(result: Result) -> Points:
    position = result.evaluations.get(result.run.recipe.steps, {}).get("tasks", {}).get("position")
    if not position or "off" not in position["memory"]:
        return []
    S = position["segment_length"]
    on, off = (position["memory"][memory]["by_segment"]["loss"] for memory in ("on", "off"))
    return [(S * (s + 0.5), without - with_it) for s, (with_it, without) in enumerate(zip(on, off, strict=True))]
