"""evaluation.json as tables and pictures. Everything here is a function of that file's content."""

from pathlib import Path

from rich.console import Console, Group
from rich.table import Table

from infini_ds.evaluation import plots

NAMES = {"on": "its own", "off": "off", "other": "of another document"}
SHOWN = 8  # lines of a long table


def show(evaluation: dict, console: Console) -> None:
    model = evaluation["model"]
    console.print(
        f"\n{model['path']}: {model['model_type']}, {model['parameters'] / 1e6:.1f}M parameters, "
        f"sha256 {model['sha256'][:12]}",
        highlight=False,
    )
    for name, result in evaluation["tasks"].items():
        console.print(TABLES[name](result))


def picture(evaluation: dict, folder: Path) -> None:
    for name, result in evaluation["tasks"].items():
        if name in PLOTS:
            PLOTS[name](result, folder)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
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


TABLES = {"position": position_table}
PLOTS = {"position": lambda result, folder: plots.memory_by_position(result, folder / "position.png")}
