"""A benchmark of ranks that share a row: time of a step, and bytes sent, against ranks and the length of the row."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from infini_ds.benchmarks.contenders import ModelShape
from infini_ds.benchmarks.tables import new_table
from infini_ds.evaluation.plots import plt, save_figure


@dataclass(frozen=True)
class RankSpeed:
    """A training step of ranks that share one row, on the first of them.

    Attributes:
        seconds: of the step; cpu_seconds: of the rank's own CPU time in it, which waiting for others is no part of.
        blocks: of the row.
        exchanges, exchanged_bytes: collectives of forward and backward pass, and what the rank sends for them.
        formula_bytes: what a plan says of these, without the sum of the loss.
        gradient_bytes: what the rank sends for the sum of the gradients.
        peak_memory: bytes above those of the model, its gradients and its optimizer.
    """

    seconds: float
    cpu_seconds: float
    blocks: int
    exchanges: int
    exchanged_bytes: int
    formula_bytes: int
    gradient_bytes: int
    peak_memory: int


@dataclass(frozen=True)
class RankCase:
    """So many ranks at one length; block: segments of a block that each computes, None: all of them."""

    tokens: int
    ranks: int
    block: int | None


@dataclass(frozen=True)
class RankMeasurement:
    """A case in one round, or its medians."""

    case: RankCase
    result: RankSpeed
    round: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as one flat object, a line of the benchmark's JSONL file."""
        return {"round": self.round} | asdict(self.case) | asdict(self.result)


def run_ranks(cases: Sequence[RankCase], shape: ModelShape, steps: int, rounds: int) -> Iterator[RankMeasurement]:
    """Yield each measurement once it is done, all cases in each round.

    Raises:
        RuntimeError: a rank failed; the message has its output.
    """
    for number in range(rounds):
        for case in cases:
            yield RankMeasurement(case, _run_case(case, shape, steps), number)


def _run_case(case: RankCase, shape: ModelShape, steps: int) -> RankSpeed:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
        common = asdict(case) | {"steps": steps, "shape": asdict(shape), "store": str(Path(folder, "rendezvous"))}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "infini_ds.benchmarks.rank_worker", json.dumps(common | {"rank": rank})],
                stdout=subprocess.PIPE,
                stderr=files.enter_context(Path(folder, f"rank{rank}").open("w")),
                text=True,
            )
            for rank in range(case.ranks)
        ]
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.05)
        for rank, process in enumerate(ranks):
            if process.poll():
                for other in ranks:
                    other.kill()
                text = Path(folder, f"rank{rank}").read_text().strip()
                raise RuntimeError(f"rank {rank} of {case} failed with exit code {process.returncode}:\n{text}")
        output, _ = ranks[0].communicate()
    return RankSpeed(**json.loads(output.strip().splitlines()[-1]))


def medians(measurements: Sequence[RankMeasurement]) -> list[RankMeasurement]:
    """Return the median of each field over the rounds of each case, in the order of the first round."""
    by_case: dict[RankCase, list[RankSpeed]] = {}
    for one in measurements:
        by_case.setdefault(one.case, []).append(one.result)

    def median(results: list[RankSpeed]) -> RankSpeed:
        names = [field.name for field in fields(RankSpeed)]
        return RankSpeed(**{name: statistics.median(getattr(one, name) for one in results) for name in names})

    return [RankMeasurement(case, median(results)) for case, results in by_case.items()]


def rank_table(measurements: Sequence[RankMeasurement]) -> Table:
    table = new_table(
        *("tokens", "ranks", "blocks", "s a step", "CPU s", "tokens/s", "sent for the row", "formula"),
        *("for gradients", "memory"),
        text_column="",
    )
    table.caption = (
        "CPU s: of a rank, without waiting; sent: bytes of a rank in a step, counted at the collectives; memory: of a "
        "rank, above the model"
    )
    previous = None
    for one in measurements:
        case, result = one.case, one.result
        if previous not in (None, case.tokens):
            table.add_section()
        previous = case.tokens
        table.add_row(
            *(f"{case.tokens:,}", str(case.ranks), f"{result.blocks:,.0f}"),
            *(f"{seconds:.3g}" for seconds in (result.seconds, result.cpu_seconds)),
            f"{case.tokens / result.seconds:,.0f}",
            *(f"{x:,.0f}" for x in (result.exchanged_bytes, result.formula_bytes, result.gradient_bytes)),
            f"{result.peak_memory / 2**20:,.0f} MiB",
        )
    return table


def plot_ranks(measurements: Sequence[RankMeasurement], file: Path) -> None:
    """Plot the time of a step against ranks, and the bytes that a rank sends against the length of the row."""
    figure, (speed, traffic) = plt.subplots(1, 2, figsize=(11, 4.5))
    for tokens in dict.fromkeys(one.case.tokens for one in measurements):
        of_row = [one for one in measurements if one.case.tokens == tokens]
        ranks = [one.case.ranks for one in of_row]
        wall, cpu = ([getattr(one.result, name) for one in of_row] for name in ("seconds", "cpu_seconds"))
        (line,) = speed.plot(ranks, wall, "o-", markersize=4, label=f"{tokens:,} tokens")
        speed.plot(ranks, cpu, "s--", color=line.get_color(), markersize=4)
    for number in dict.fromkeys(one.case.ranks for one in measurements if one.case.ranks > 1):
        chosen = [one for one in measurements if one.case.ranks == number]
        lengths = [one.case.tokens for one in chosen]
        counted, formula = (
            [getattr(one.result, f"{name}_bytes") / 1e6 for one in chosen] for name in ("exchanged", "formula")
        )
        (line,) = traffic.plot(lengths, counted, marker="o", label=f"{number} ranks, counted")
        traffic.plot(lengths, formula, "x", color=line.get_color(), markersize=9, label=f"{number} ranks, formula")
    speed.set(xlabel="ranks that share a row", ylabel="seconds a step (dashed: a rank's CPU time)", yscale="log")
    speed.set_xticks(sorted({one.case.ranks for one in measurements}))
    traffic.set(xlabel="tokens in a row", ylabel="MB that a rank sends in a step", yscale="log")
    traffic.set_xscale("log", base=2)
    traffic.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (speed, traffic):
        axes.yaxis.set_major_formatter("{x:,.4g}")
        if axes.has_data():
            axes.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    figure.tight_layout()
    save_figure(figure, file)
