"""evaluation.json as tables and pictures. Everything here is a function of that file's content."""

from pathlib import Path

from rich.console import Console, Group
from rich.table import Table

from infini_ds.evaluation import plots

NAMES = {"on": "its own", "off": "off", "other": "of another document"}
SHOWN = 8  # lines of a long table


def show(model: dict, tasks: dict, console: Console) -> None:
    console.print(
        f"\n{model['path']}: {model['model_type']}, {model['parameters'] / 1e6:.1f}M parameters, "
        f"sha256 {model['sha256'][:12]}",
        highlight=False,
    )
    for name, result in tasks.items():
        console.print(TABLES[name](result))


def picture(tasks: dict, folder: Path) -> None:
    for name, result in tasks.items():
        if name in PLOTS:
            PLOTS[name](result, folder)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def position_table(result: dict) -> Group:
    title = f"loss by position: {result['rows']} rows of {result['sequence_length']:,} tokens"
    whole = _table(title, "memory", "loss", "perplexity", "the model's own gains")
    for memory, measured in result["memory"].items():
        gained = result["gained"].get(memory)
        error = "" if not gained or gained["standard_error"] is None else f" ± {gained['standard_error']:.4f}"
        whole.add_row(
            NAMES[memory],
            f"{measured['loss']:.4f}",
            f"{measured['perplexity']:.2f}",
            f"{gained['mean']:+.4f}{error}" if gained else "",
        )
    S = result["segment_length"]
    lists = {memory: measured["by_segment"]["loss"] for memory, measured in result["memory"].items()}
    number = len(lists["on"])
    segments = _table(f"loss by segment of {S} tokens", "segment", *(f"memory {NAMES[memory]}" for memory in lists))
    for s in range(0, number, -(-number // SHOWN)):
        segments.add_row(str(s + 1), *(f"{losses[s]:.4f}" for losses in lists.values()))
    return Group(whole, segments)


def blimp_table(result: dict) -> Table:
    pairs = sum(each["pairs"] for each in result["paradigms"].values())
    table = _table(f"BLiMP: {pairs:,} pairs", "phenomenon", "paradigms", "accuracy")
    for name, accuracy in result["phenomena"].items():
        number = sum(each["phenomenon"] == name for each in result["paradigms"].values())
        table.add_row(name.replace("_", " "), str(number), f"{accuracy:.3f}")
    table.add_section()
    table.add_row("all, mean over paradigms", str(len(result["paradigms"])), f"{result['accuracy']:.3f}")
    return table


def recall_table(result: dict) -> Table:
    S = result["segment_length"]
    points = [point for task in result["tasks"].values() for point in task["points"]]
    settings = list(points[0]["accuracy"])
    table = _table(
        f"recall: {result['examples']} examples a line, segments of {S} tokens",
        *("task", "segments between", "answers", *(f"memory {NAMES[memory]}" for memory in settings), "chance"),
    )
    for name, task in result["tasks"].items():
        table.add_section()
        for number in dict.fromkeys(point["segments"] for point in task["points"]):
            at = [point for point in task["points"] if point["segments"] == number]
            deep = f" in all, {len(at)} depths" if len(at) > 1 else ""
            means = [sum(point["accuracy"][memory] for point in at) / len(at) for memory in settings]
            answers = sum(point["answers"] for point in at)
            shown = [f"{mean:.3f}" for mean in means]
            table.add_row(name, f"{number}{deep}", str(answers), *shown, f"{task['chance']:.3g}")
            name = ""  # once for each task
    return table


def glue_table(result: dict) -> Table:
    table = _table("GLUE and SuperGLUE, fine-tuned", "task", "metric", "value", "commonest answer", "training examples")
    for name, task in result["tasks"].items():
        figures = f"{task['value']:.3f}", f"{task['majority']:.3f}", f"{task['train']:,}"
        table.add_row(name, task["metric"], *figures)
    table.add_section()
    table.add_row("mean", "", f"{result['mean']:.3f}")
    return table


TABLES = {"position": position_table, "recall": recall_table, "blimp": blimp_table, "glue": glue_table}
PLOTS = {
    "blimp": lambda result, folder: plots.blimp(result, folder / "blimp.png"),
    "recall": lambda result, folder: plots.recall(result, folder / "recall.png"),
    "position": lambda result, folder: plots.memory_by_position(result, folder / "position.png"),
}
