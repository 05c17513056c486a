"""Tables of a benchmark for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from infini_ds.benchmarks.results import Case, GenerationSpeed, Measurement, OutOfMemory, Profile, TrainingSpeed

MAX_OPERATORS = 20  # of a profile that have a line of their own
OUT_OF_MEMORY = "out of memory"


def training_table(cases: Sequence[Case[TrainingSpeed]]) -> Table:
    table = new_table("tokens", "contender", "tokens/s", "ratio", "MFU", "matrix rate", "peak memory above the model")
    table.caption = "ratio: tokens/s over the first contender's; MFU: of the matrix rate measured in the same process"
    previous = None
    for case in cases:
        if previous not in (None, case.tokens):
            table.add_section()
        previous, result = case.tokens, case.result
        if isinstance(result, OutOfMemory):
            table.add_row(f"{case.tokens:,}", case.contender, OUT_OF_MEMORY)
            continue
        block = f" (G = {result.segments_per_block:.0f})" if result.segments_per_block else ""
        table.add_row(
            f"{case.tokens:,}",
            case.contender + (block if case.contender.endswith("auto") else ""),
            f"{result.tokens_per_s:,.0f}",
            format_ratio(case),
            "" if result.mfu is None else f"{result.mfu:.0%}",
            f"{result.matrix_flops / 1e9:,.0f} GFLOP/s",
            f"{result.peak_memory / 2**20:,.0f} MiB",
        )
    return table


def profile_table(measurement: Measurement[Profile]) -> Table:
    """Return a table of the operators that take the most time by themselves, and the sum of all others."""
    table = new_table("operator", "calls", "share of the time", text_column="operator")
    table.title = f"{measurement.contender}, {measurement.tokens:,} tokens, round {measurement.round + 1}"
    if isinstance(measurement.result, OutOfMemory):
        table.add_row(OUT_OF_MEMORY)
        return table
    operators = measurement.result.operators
    total = sum(operator.seconds for operator in operators)
    for operator in operators[:MAX_OPERATORS]:
        table.add_row(operator.name, f"{operator.calls:,}", f"{operator.seconds / total:.1%}")
    if others := operators[MAX_OPERATORS:]:
        seconds, calls = (sum(getattr(one, name) for one in others) for name in ("seconds", "calls"))
        table.add_row(f"{len(others)} others", f"{calls:,}", f"{seconds / total:.1%}")
    return table


def generation_table(cases: Sequence[Case[GenerationSpeed]]) -> Table:
    table = new_table(
        *(
            "prompt tokens",
            "contender",
            "ms/token",
            "ratio",
            "CPU ms/token",
            "reading, tokens/s",
            "cache",
            "peak memory",
        )
    )
    table.caption = "CPU ms: of all threads, without the time that other processes take"
    for case in cases:
        result = case.result
        if isinstance(result, OutOfMemory):
            table.add_row(f"{case.tokens:,}", case.contender, OUT_OF_MEMORY)
            continue
        table.add_row(
            f"{case.tokens:,}",
            case.contender,
            f"{1e3 * result.seconds_per_token:.2f}",
            format_ratio(case),
            f"{1e3 * result.cpu_seconds_per_token:.2f}",
            f"{result.reading_tokens_per_s:,.0f}",
            f"{result.cache_bytes / 2**10:,.0f} KiB",
            f"{result.peak_memory / 2**20:,.0f} MiB",
        )
    return table


def format_ratio(case: Case) -> str:
    return "" if case.ratio is None else f"{case.ratio:.2f}"


def new_table(*columns: str, text_column: str = "contender") -> Table:
    """Return an empty table whose columns are numbers, except one."""
    table = Table()
    for name in columns:
        table.add_column(name, justify="left" if name == text_column else "right")
    return table
