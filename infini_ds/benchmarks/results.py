"""What a benchmark measures, and medians over its rounds."""

import statistics
from dataclasses import asdict, dataclass, fields
from typing import Any, Generic, TypeVar


@dataclass(frozen=True)
class TrainingSpeed:
    """A training step. The last three are None for contenders whose FLOPs are not counted.

    peak_memory: bytes above those of the model, its gradients and its optimizer.
    matrix_flops: FLOP/s of a large matrix product, measured before each step.
    mfu: model FLOP/s over matrix_flops; bound_tokens_per_s: tokens/s at an MFU of 1.
    """

    tokens_per_s: float
    peak_memory: int
    matrix_flops: float
    mfu: float | None = None
    segments_per_block: int | None = None
    bound_tokens_per_s: float | None = None


@dataclass(frozen=True)
class GenerationSpeed:
    """Generation one token at a time after a prompt, which is read first.

    seconds_per_token: of one new token in each row; cpu_seconds_per_token: of all threads, without what other processes
    of the machine take. reading_tokens_per_s: of all rows, until the first new token.
    peak_memory: bytes above those of the model.
    """

    reading_tokens_per_s: float
    seconds_per_token: float
    cpu_seconds_per_token: float
    cache_bytes: int
    peak_memory: int


@dataclass(frozen=True)
class Operator:
    """Time in one operator, without the operators that it calls."""

    name: str
    seconds: float
    calls: int


@dataclass(frozen=True)
class Profile:
    """The operators of some training steps, or the kernels of a GPU, the slowest first.

    busy: share of the time of a step, without the profiler, in which the GPU computes; None on the CPU.
    """

    operators: tuple[Operator, ...]
    busy: float | None = None


@dataclass(frozen=True)
class OutOfMemory:
    """The contender needs more memory than the machine has."""


Result = TypeVar("Result", TrainingSpeed, GenerationSpeed, Profile)
Speed = TypeVar("Speed", TrainingSpeed, GenerationSpeed)


@dataclass(frozen=True)
class Measurement(Generic[Result]):
    """One contender at one length in one round."""

    round: int
    tokens: int
    contender: str
    result: Result | OutOfMemory

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as one flat object, a line of the benchmark's JSONL file."""
        key = {"round": self.round, "tokens": self.tokens, "contender": self.contender}
        if isinstance(self.result, OutOfMemory):
            return key | {"failed": "out of memory"}
        return key | {name: value for name, value in asdict(self.result).items() if value is not None}


@dataclass(frozen=True)
class Case(Generic[Speed]):
    """Medians over the rounds of one contender at one length.

    ratio: median of the ratios to the first contender of the same round; None if that one ran out of memory.
    """

    tokens: int
    contender: str
    result: Speed | OutOfMemory
    ratio: float | None = None


def summarize(measurements: list[Measurement[Speed]], figure: str) -> list[Case[Speed]]:
    """Return the medians of each case, in the order of the first round.

    Args:
        figure: the field whose ratio to the first contender is taken, such as "tokens_per_s".
    """
    by_case: dict[tuple[int, str], list[Measurement[Speed]]] = {}
    for measurement in measurements:
        by_case.setdefault((measurement.tokens, measurement.contender), []).append(measurement)
    first_contender = measurements[0].contender
    cases = []
    for (tokens, contender), rounds in by_case.items():
        results = [one.result for one in rounds if not isinstance(one.result, OutOfMemory)]
        if len(results) < len(rounds):
            cases.append(Case[Speed](tokens, contender, OutOfMemory()))
            continue
        first = {one.round: one.result for one in by_case[tokens, first_contender]}
        ratios = [
            getattr(one.result, figure) / getattr(first[one.round], figure)
            for one in rounds
            if not isinstance(first[one.round], OutOfMemory)
        ]
        ratio = statistics.median(ratios) if len(ratios) == len(rounds) else None
        cases.append(Case(tokens, contender, _median(results), ratio))
    return cases


def _median(results: list[Speed]) -> Speed:
    """Return the median of each field."""
    medians: dict[str, Any] = {}
    for column in fields(results[0]):
        values = [getattr(result, column.name) for result in results]
        medians[column.name] = None if None in values else statistics.median(values)
    return type(results[0])(**medians)
