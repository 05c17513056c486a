"""Rounds of figures, contenders in turn, and what they come to."""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from infini_ds.benchmarks.contenders import Shape
from infini_ds.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Plan:
    """What is measured: every contender at every length, `rounds` times, each time in a new process."""

    kind: str  # "training", "profile" or "generation"
    contenders: tuple[str, ...]
    lengths: tuple[int, ...]
    shape: Shape
    steps: int
    rounds: int

    def cases(self) -> list[tuple[int, str]]:
        """One round, in order: the contenders of one length follow each other, under one load."""
        return [(tokens, contender) for tokens in self.lengths for contender in self.contenders]


def run(plan: Plan) -> Iterator[dict]:
    """Measure, yielding each figure as it is there: {"round", "tokens", "contender", …}, see `worker`.

    A case that failed for lack of memory is not tried again.

    Raises:
        UserError: a figure's process failed otherwise; its last line says why.
    """
    failed = {}
    for number in range(plan.rounds):
        for tokens, contender in plan.cases():
            case = {"round": number, "tokens": tokens, "contender": contender}
            if (tokens, contender) not in failed:
                figure = _measure(plan, tokens, contender)
                if "failed" in figure:
                    failed[tokens, contender] = figure
                yield case | figure


def _measure(plan: Plan, tokens: int, contender: str) -> dict:
    task = {"contender": contender, "tokens": tokens, "steps": plan.steps, "shape": asdict(plan.shape)}
    done = subprocess.run(
        [sys.executable, "-m", "infini_ds.benchmarks.worker", plan.kind, json.dumps(task)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode == -9:
        return {"failed": "out of memory"}  # ended by the system
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        raise UserError(f"{contender} at {tokens} tokens: {lines[-1].rpartition('Error: ')[2]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summarize(plan: Plan, figures: list[dict], figure: str) -> dict[tuple[int, str], dict]:
    """For each case: medians of all figures over the rounds, and of the ratio of `figure` to the first contender's in
    the same round.
    """
    cases = {}
    for tokens, contender in plan.cases():
        rounds = [f for f in figures if (f["tokens"], f["contender"]) == (tokens, contender)]
        if any("failed" in f for f in rounds):
            cases[tokens, contender] = {"failed": rounds[-1]["failed"]}
            continue
        summary = {
            name: statistics.median(f[name] for f in rounds) if isinstance(value, int | float) else value
            for name, value in rounds[-1].items()
        }
        first = {f["round"]: f for f in figures if (f["tokens"], f["contender"]) == (tokens, plan.contenders[0])}
        if not any("failed" in f for f in first.values()):
            summary["ratio"] = statistics.median(f[figure] / first[f["round"]][figure] for f in rounds)
        cases[tokens, contender] = summary
    return cases
