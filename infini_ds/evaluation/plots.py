"""Plots of reports, and the style and the colors of all plots. Matplotlib is imported here only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes as Axes  # for the tasks' plots
from matplotlib.figure import Figure

from infini_ds.evaluation.tables import MEMORY_LABELS

plt.rcParams.update(
    {
        "figure.figsize": (8, 4.5),
        "figure.dpi": 120,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }
)
MEMORY_COLORS = {"on": "tab:blue", "off": "tab:orange", "other": "tab:green"}
TRAINING_COLOR = "0.6"
MAX_BOUNDARIES = 64  # of segments that are drawn as lines; more would hide the curves
MAX_LAYERS = 12  # that have a panel of gates


def memory_style(memory: str) -> dict[str, Any]:
    """Return the color and the label of a curve, by the setting of the memory."""
    return {"color": MEMORY_COLORS[memory], "label": MEMORY_LABELS[memory]}


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure to a file and free it."""
    figure.savefig(file)
    plt.close(figure)


def _save_axes(figure: Figure, file: Path) -> None:
    figure.tight_layout()
    save_figure(figure, file)


def plot_loss_curves(metrics: Sequence[Mapping[str, float]], file: Path) -> None:
    """Plot training and validation loss over the steps."""
    figure, axes = plt.subplots()
    for name, label, color, marker, width in (
        ("train/loss", "training", TRAINING_COLOR, "", 1.0),
        ("validation/loss", "validation", MEMORY_COLORS["on"], "o", 1.5),
        ("validation/loss_memory_off", "validation, memory off", MEMORY_COLORS["off"], "o", 1.5),
    ):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, label=label, color=color, marker=marker, markersize=4, linewidth=width)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    axes.legend()
    _save_axes(figure, file)


def plot_loss_by_position(
    positions: Sequence[float], on: Sequence[float], off: Sequence[float], segment_length: int, file: Path
) -> None:
    """Plot the loss by position in the row with the memory on and off, and the segment boundaries if they are few."""
    figure, axes = plt.subplots()
    for memory, losses in (("off", off), ("on", on)):
        axes.plot(positions, losses, marker=".", markersize=5, **memory_style(memory))
    end = positions[-1]
    if end / segment_length <= MAX_BOUNDARIES:
        for at in range(segment_length, int(end) + 1, segment_length):
            axes.axvline(at, color="0.85", linewidth=0.6, zorder=0)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="position in the row (tokens)", ylabel="loss (nats a token)", title="Loss by position")
    axes.legend()
    _save_axes(figure, file)


def plot_gates(metrics: Sequence[Mapping[str, float]], file: Path) -> None:
    """Plot each head's gate over the steps, one panel a layer."""
    lines = [line for line in metrics if any(name.startswith("gate/") for name in line)]
    names = [name for name in lines[-1] if name.startswith("gate/")]
    layers = sorted({int(name.split("/")[1].removeprefix("layer_")) for name in names})[:MAX_LAYERS]
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(2.6 * columns + 1, 2.4 * rows + 0.8), sharex=True, sharey=True, squeeze=False
    )
    steps = [line["step"] for line in lines]
    colors = plt.get_cmap("viridis")
    for layer, axes in zip(layers, panels.flat, strict=False):
        heads = [name for name in names if name.startswith(f"gate/layer_{layer}/")]
        for head, name in enumerate(heads):
            color = colors(head / max(1, len(heads)))
            axes.plot(steps, [line[name] for line in lines], linewidth=1.2, color=color)
        axes.axhline(0.5, color="0.7", linewidth=0.7, zorder=0)
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.set_ylim(0, 1)
    for axes in panels.flat[len(layers) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("gate: weight of the memory", fontsize=10)
    figure.suptitle("Gates, one line a head", fontsize=12)
    _save_axes(figure, file)
