"""Tables of results for the terminal."""

from rich.table import Table

MAX_LINES = 8  # of a table by position or segment
MEMORY_LABELS = {"on": "memory on", "off": "memory off", "other": "memory of another document"}


def new_table(title: str, *columns: str) -> Table:
    """Return an empty table whose first column is text and whose other columns are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table
