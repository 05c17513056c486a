"""Run a benchmark: several rounds, contenders in turn, each measurement in a new process."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from infini_ds.benchmarks.contenders import ModelShape
from infini_ds.benchmarks.process import run_worker
from infini_ds.benchmarks.results import GenerationSpeed, Measurement, Operator, OutOfMemory, Profile, TrainingSpeed

AnyResult = TrainingSpeed | GenerationSpeed | Profile


@dataclass(frozen=True)
class BenchmarkPlan:
    """What to measure: every contender at every length, `rounds` times.

    kind: "training", "profile" or "generation". lengths: tokens in a row. steps: of one measurement. prompts: rows of
    a batch that generation continues.
    """

    kind: str
    contenders: tuple[str, ...]
    lengths: tuple[int, ...]
    shape: ModelShape
    steps: int
    rounds: int
    prompts: int = 1

    def cases(self) -> list[tuple[int, str]]:
        """Return (tokens, contender) of one round. Contenders of one length follow each other, under the same load."""
        return [(tokens, contender) for tokens in self.lengths for contender in self.contenders]


def run_benchmark(plan: BenchmarkPlan) -> Iterator[Measurement[Any]]:
    """Yield each measurement once it is done. A case that runs out of memory is not tried again.

    Raises:
        UserError: a contender cannot be built, such as one whose package is not installed.
        RuntimeError: a worker process failed; the message has its output.
    """
    out_of_memory = set()
    for number in range(plan.rounds):
        for tokens, contender in plan.cases():
            if (tokens, contender) in out_of_memory:
                continue
            result = _run_worker(plan, tokens, contender)
            if isinstance(result, OutOfMemory):
                out_of_memory.add((tokens, contender))
            yield Measurement(number, tokens, contender, result)


def _run_worker(plan: BenchmarkPlan, tokens: int, contender: str) -> AnyResult | OutOfMemory:
    case = {"contender": contender, "tokens": tokens, "steps": plan.steps, "shape": asdict(plan.shape)}
    if plan.kind == "generation":
        case["rows"] = plan.prompts
    try:
        content = run_worker(plan.kind, case)
    except RuntimeError as error:
        raise RuntimeError(f"{contender} at {tokens} tokens {error}") from error
    return parse_result(plan.kind, content)


def parse_result(kind: str, content: dict[str, Any]) -> AnyResult | OutOfMemory:
    """Return the result that a worker printed."""
    if content.get("out_of_memory"):
        return OutOfMemory()
    if kind == "profile":
        return Profile(tuple(Operator(**operator) for operator in content["operators"]), content["busy"])
    return GenerationSpeed(**content) if kind == "generation" else TrainingSpeed(**content)
