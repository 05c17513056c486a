"""What the runs of a study have reached: read from their folders, and put together over seeds."""

import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from infini_ds.config.lr_schedule import gate_reach
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.study.commands import evaluation_folder, read_evaluation
from infini_ds.study.grid import Run
from infini_ds.utils.hashing import sha256_of_file

GATE = re.compile(r"gate/layer_(\d+)/head_(\d+)")


@dataclass(frozen=True)
class Spread:
    """Of one figure over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The standard deviation of single runs; None of one alone."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def apart_from(self, other: "Spread") -> bool:
        """Whether every run of one is below every run of the other."""
        return self.high < other.low or other.high < self.low


def spread(values) -> Spread | None:
    """None if there are none."""
    there = tuple(value for value in values if value is not None)
    return Spread(there) if there else None


def chance_apart(one: int, other: int) -> float:
    """How often two groups of so many runs lie apart, as `Spread.apart_from` says, if they do not differ at all."""
    return 2 / math.comb(one + other, one)


@dataclass(frozen=True)
class Result:
    """A finished run."""

    run: Run
    start: "Result | None"
    metrics: list[dict]
    evaluations: dict[int, dict]  # step -> evaluation.json

    @cached_property
    def tokens(self) -> int:
        """Of the whole way, that of the run that it starts from included."""
        return self.own_tokens[-1][1] + (self.start.tokens if self.start else 0)

    @cached_property
    def own_tokens(self) -> list[tuple[int, int]]:
        """(step, tokens seen in this run)"""
        return [(line["step"], line["train/tokens"]) for line in self.metrics if "train/tokens" in line]

    @property
    def step_tokens(self) -> float:
        step, tokens = self.own_tokens[-1]
        return tokens / step

    @cached_property
    def validation(self) -> dict[int, tuple[float, float]]:
        """step -> loss with the memory, and without it"""
        return {
            line["step"]: (line["validation/loss"], line["validation/loss_memory_off"])
            for line in self.metrics
            if "validation/loss" in line
        }

    @property
    def loss(self) -> float | None:
        return self.validation[max(self.validation)][0] if self.validation else None

    @property
    def loss_memory_off(self) -> float | None:
        return self.validation[max(self.validation)][1] if self.validation else None

    @cached_property
    def gates(self) -> dict[tuple[int, int], list[tuple[int, float]]]:
        """(layer, head) -> (step, gate), from the start on"""
        first = 1 / (1 + math.exp(-self.run.gate_start))
        curves: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for line in self.metrics:
            for name, gate in line.items():
                if match := GATE.fullmatch(name):
                    curves.setdefault((int(match[1]), int(match[2])), [(0, first)]).append((line["step"], gate))
        return curves

    @property
    def model_sha256(self) -> str:
        evaluation = self.evaluations.get(self.run.recipe.steps)
        return evaluation["model"]["sha256"] if evaluation else sha256_of_file(self.run.export / "model.safetensors")

    @cached_property
    def data(self) -> dict:
        """The run's data_manifest.json."""
        return json.loads((self.run.folder / "data_manifest.json").read_text())

    @property
    def data_sha256(self) -> str:
        """Of the shards that it was trained on."""
        return ", ".join(stream["shards"] for stream in self.data["fingerprint"]["streams"])

    @property
    def document_tokens(self) -> float:
        """Of a document of its training text, on average."""
        counts = self.data["streams"][0]["manifest"]["train"]
        return counts["tokens"] / counts["documents"]

    @property
    def blimp_pairs(self) -> int:
        """That its last step was scored on."""
        blimp = self.evaluations.get(self.run.recipe.steps, {}).get("tasks", {}).get("blimp")
        return sum(paradigm["pairs"] for paradigm in blimp["paradigms"].values()) if blimp else 0

    def steps_with(self, task: str) -> list[int]:
        return [step for step in sorted(self.evaluations) if self.score(task, step) is not None]

    def score(self, task: str, step: int | None = None) -> float | None:
        """Accuracy in BLiMP (`blimp`), or mean over the tasks of (Super)GLUE (`glue`): of the last step, or another."""
        step = self.run.recipe.steps if step is None else step
        found = self.evaluations.get(step, {}).get("tasks", {}).get(task)
        return None if found is None else found["accuracy" if task == "blimp" else "mean"]


@dataclass(frozen=True)
class Cell:
    """Runs that differ by their seed alone."""

    name: str
    results: tuple[Result, ...]

    @property
    def run(self) -> Run:
        return self.results[0].run

    def over_seeds(self, figure: Callable[[Result], float | None]) -> Spread | None:
        return spread(figure(result) for result in self.results)


def collect(runs: list[Run]) -> list[Result]:
    """Of the runs that are trained and exported."""
    found: dict[str, Result] = {}
    for run in runs:
        if run.export.is_dir():
            evaluations = {step: read_evaluation(evaluation_folder(run, step)) for step in run.evaluated_steps}
            there = {step: evaluation for step, evaluation in evaluations.items() if evaluation}
            start = found.get(run.start.name) if run.start else None
            found[run.name] = Result(run, start, read_metrics(run.folder), there)
    return list(found.values())


def cells(results: list[Result]) -> list[Cell]:
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(cell_name(result.run), []).append(result)
    return [Cell(name, tuple(of_name)) for name, of_name in grouped.items()]


def cell_name(run: Run) -> str:
    return run.name.rpartition("-seed")[0]


@dataclass(frozen=True)
class Movement:
    """How a run's gates beta moved, means over all heads.

    moved: from start to end. path: the way they went, up and down added up. half: share of the path that lay behind
    them after half of the steps. reach: how far the learning rates let a gate go. reach_half: share of that by then.
    """

    moved: float
    path: float
    half: float
    reach: float
    reach_half: float


def movement(result: Result) -> Movement | None:
    """None of a run whose memory is never read, for there its gates do not move."""
    if result.run.is_plain or not result.gates:
        return None
    steps = result.run.recipe.steps
    moved, path, first_half = [], [], []
    for curve in result.gates.values():
        betas = [(step, math.log(gate / (1 - gate))) for step, gate in curve]
        ways = [(now[0], abs(now[1] - before[1])) for before, now in pairwise(betas)]
        moved.append(abs(betas[-1][1] - betas[0][1]))
        path.append(sum(way for _, way in ways))
        first_half.append(sum(way for step, way in ways if step <= steps / 2))
    reach = gate_reach(result.run.recipe)
    return Movement(
        statistics.fmean(moved),
        statistics.fmean(path),
        sum(first_half) / sum(path) if sum(path) else 0.0,
        reach,
        gate_reach(result.run.recipe, steps // 2) / reach if reach else 0.0,
    )
