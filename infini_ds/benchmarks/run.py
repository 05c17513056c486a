"""Run a benchmark and show it: measurements into a JSONL file as they are made, then tables and a plot."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console

from infini_ds.benchmarks.contenders import ModelShape
from infini_ds.benchmarks.gpu.machine import cpu_name
from infini_ds.benchmarks.measure import BenchmarkPlan, run_benchmark
from infini_ds.benchmarks.plot import plot_speed_and_memory
from infini_ds.benchmarks.ranks import RankCase, medians, plot_ranks, rank_table, run_ranks
from infini_ds.benchmarks.results import summarize
from infini_ds.benchmarks.tables import generation_table, profile_table, training_table


class HasJson(Protocol):
    def to_json(self) -> dict[str, Any]: ...


Measured = TypeVar("Measured", bound=HasJson)


def benchmark_contenders(plan: BenchmarkPlan, out: Path, console: Console) -> None:
    """Measure contenders side by side; files go to the folder `out`."""
    number = len(plan.cases()) * plan.rounds
    measurements = _collect(run_benchmark(plan), out / f"{plan.kind}.jsonl", number, console)
    _describe(plan.shape, console)
    if plan.kind == "profile":
        for measurement in measurements:
            console.print(profile_table(measurement))
    elif plan.kind == "generation":
        console.print(f"{plan.prompts} {'prompt' if plan.prompts == 1 else 'prompts'} at once; a token is one of each.")
        console.print(generation_table(summarize(measurements, "seconds_per_token")))
    else:
        cases = summarize(measurements, "tokens_per_s")
        console.print(training_table(cases))
        plot_speed_and_memory(cases, out / "training.png")


def benchmark_ranks(
    cases: Sequence[RankCase], shape: ModelShape, steps: int, rounds: int, out: Path, console: Console
) -> None:
    """Measure the steps of processes that share a row; files go to the folder `out`."""
    measurements = _collect(run_ranks(cases, shape, steps, rounds), out / "ranks.jsonl", len(cases) * rounds, console)
    _describe(shape, console)
    console.print(rank_table(medians(measurements)))
    plot_ranks(medians(measurements), out / "ranks.png")


def _collect(measurements: Iterable[Measured], file: Path, number: int, console: Console) -> list[Measured]:
    """Return the measurements, `number` of them at most, each written to `file` as soon as it is made."""
    found: list[Measured] = []
    with console.status("") as status, file.open("w", buffering=1) as lines:
        for measurement in measurements:
            found.append(measurement)
            lines.write(json.dumps(measurement.to_json()) + "\n")
            status.update(f"{len(found)} of {number} measured")
    return found


def _describe(shape: ModelShape, console: Console) -> None:
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    console.print(f"{machine}, {shape.precision}: {shape.layers} layers of width {shape.width}, {shape.heads} heads,")
    console.print(
        f"vocabulary {shape.vocabulary:,}, segments of {shape.segment_length} tokens, {shape.memory_rule} rule."
    )
