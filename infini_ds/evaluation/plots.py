"""The pictures of reports and benchmarks."""

import math
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

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
ON, OFF, OTHER, TRAIN = "tab:blue", "tab:orange", "tab:green", "0.6"


def _save(axes: Axes, file: Path) -> None:
    axes.figure.tight_layout()
    axes.figure.savefig(file)
    plt.close(axes.figure)


def loss_curves(metrics: list[dict], file: Path) -> None:
    """Training and validation loss over the steps."""
    _, axes = plt.subplots()
    for name, label, style in (
        ("train/loss", "training", {"color": TRAIN, "linewidth": 1}),
        ("validation/loss", "validation", {"color": ON, "marker": "o", "markersize": 4}),
        ("validation/loss_memory_off", "validation, memory off", {"color": OFF, "marker": "o", "markersize": 4}),
    ):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    axes.legend()
    _save(axes, file)


def loss_by_position(
    positions: list[float], on: list[float], off: list[float], segment_length: int, file: Path
) -> None:
    """Loss by position in the sequence, with and without the memory; lines at ends of segments while they are few."""
    _, axes = plt.subplots()
    axes.plot(positions, off, color=OFF, label="memory off", marker=".", markersize=5)
    axes.plot(positions, on, color=ON, label="memory on", marker=".", markersize=5)
    end = positions[-1]
    if end / segment_length <= 64:
        for at in range(segment_length, int(end) + 1, segment_length):
            axes.axvline(at, color="0.85", linewidth=0.6, zorder=0)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="position in the sequence (tokens)", ylabel="loss (nats a token)", title="Loss by position")
    axes.legend()
    _save(axes, file)


MEMORY = {"on": ("memory", ON), "off": ("memory off", OFF), "other": ("memory of another document", OTHER)}


def memory_by_position(result: dict, file: Path) -> None:
    """Loss by segment, and by the place in a segment, a line for each setting of the memory.

    `result`: of `infini_ds.evaluation.position.measure`.
    """
    figure, (along, within) = plt.subplots(1, 2, figsize=(12, 4.5), gridspec_kw={"width_ratios": [3, 2]})
    S = result["segment_length"]
    for memory, measured in result["memory"].items():
        label, color = MEMORY[memory]
        losses = measured["by_segment"]["loss"]
        middles = [S * (s + 0.5) for s in range(len(losses))]
        along.plot(middles, losses, color=color, label=label, marker="." if len(losses) <= 128 else "", markersize=5)
        places = measured["within_segment"]["loss"]
        within.plot(range(1, len(places) + 1), places, color=color, linewidth=1.2)
    along.set(xlabel="position in the row (tokens)", ylabel="loss (nats a token)", title=f"by segment of {S} tokens")
    within.set(xlabel="place in the segment (tokens)", title="by place in a segment, the first segment left out")
    figure.legend(loc="lower center", ncols=3)
    figure.suptitle(f"Loss by position, {result['rows']} rows", fontsize=12)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(file)
    plt.close(figure)


def recall(result: dict, file: Path) -> None:
    """Accuracy by segments between fact and question, a panel for each task; of tasks at several depths, by depth.

    `result`: of `infini_ds.evaluation.recall.measure`.
    """
    tasks = result["tasks"]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for axes, (name, task) in zip(panels.flat, tasks.items(), strict=False):
        axes.set_title(textwrap.fill(name.replace(",", ", "), 48), fontsize=10)
        if len({point["depth"] for point in task["points"]}) > 1:
            _by_depth(axes, task["points"])
            continue
        between = [point["segments"] for point in task["points"]]
        for memory in task["points"][0]["accuracy"]:
            label, color = MEMORY[memory]
            values = [point["accuracy"][memory] for point in task["points"]]
            axes.plot(range(len(between)), values, color=color, label=label, marker="o", markersize=4)
        axes.axhline(task["chance"], color="0.5", linestyle="--", linewidth=1, label="chance")
        axes.set_xticks(range(len(between)), between)
        axes.set(ylim=(-0.03, 1.03), xlabel="segments between fact and question", ylabel="accuracy")
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    lines = next((axes for axes in panels.flat if axes.get_legend_handles_labels()[0]), None)
    if lines is not None:
        figure.legend(*lines.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(file)
    plt.close(figure)


def _by_depth(axes: Axes, points: list[dict]) -> None:
    """With the memory on: a field for each length and depth."""
    lengths = sorted({point["segments"] for point in points})
    depths = sorted({point["depth"] for point in points})
    found = {(point["depth"], point["segments"]): point["accuracy"]["on"] for point in points}
    grid = [[found.get((depth, length), math.nan) for length in lengths] for depth in depths]
    axes.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if not math.isnan(value):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "0.2")
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.grid(visible=False)
    axes.set(xlabel="segments of filler in all", ylabel="filler before the fact")


def blimp(result: dict, file: Path) -> None:
    """Accuracy of each paradigm, by phenomenon. `result`: of `infini_ds.evaluation.blimp.measure`."""
    of_phenomenon: dict[str, list[tuple[float, str]]] = {}
    for name, each in result["paradigms"].items():
        of_phenomenon.setdefault(each["phenomenon"], []).append((each["accuracy"], name))
    means = result["phenomena"]
    _, axes = plt.subplots(figsize=(8, 1.2 + 0.36 * len(means)))
    names = sorted(means, key=means.get)
    for at, phenomenon in enumerate(names):
        axes.barh(at, means[phenomenon], color=ON, alpha=0.35, height=0.7)
        axes.plot([accuracy for accuracy, _ in of_phenomenon[phenomenon]], [at] * len(of_phenomenon[phenomenon]), "|",
                  color=ON, markersize=9)  # fmt: skip
        axes.text(1.01, at, f"{means[phenomenon]:.2f}", va="center", fontsize=9)
    axes.axvline(0.5, color=OFF, linewidth=1)
    axes.text(0.5, len(names) - 0.2, "chance", color=OFF, ha="center", va="bottom", fontsize=9)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set(xlim=(0, 1), xlabel="accuracy (bar: mean of the phenomenon; mark: a paradigm)")
    axes.set_title(f"BLiMP: {result['accuracy']:.3f} over {len(result['paradigms'])} paradigms", pad=18)
    axes.grid(axis="y", visible=False)
    _save(axes, file)


def gates(metrics: list[dict], file: Path) -> None:
    """Each head's gate over the steps, a panel for each layer (the first twelve)."""
    lines = [line for line in metrics if any(name.startswith("gate/") for name in line)]
    names = [name for name in lines[-1] if name.startswith("gate/")]
    layers = sorted({int(name.split("/")[1].removeprefix("layer_")) for name in names})[:12]
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(2.6 * columns + 1, 2.4 * rows + 0.8), sharex=True, sharey=True, squeeze=False
    )
    steps = [line["step"] for line in lines]
    for layer, axes in zip(layers, panels.flat, strict=False):
        heads = [name for name in names if name.startswith(f"gate/layer_{layer}/")]
        for head, name in enumerate(heads):
            axes.plot(
                steps, [line[name] for line in lines], linewidth=1.2, color=plt.cm.viridis(head / max(1, len(heads)))
            )
        axes.axhline(0.5, color="0.7", linewidth=0.7, zorder=0)
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.set_ylim(0, 1)
    for axes in panels.flat[len(layers) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("gate: share of the memory", fontsize=10)
    figure.suptitle("Gates, a line for each head", fontsize=12)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
