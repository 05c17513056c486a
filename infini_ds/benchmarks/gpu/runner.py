"""Run sections case by case: each in a process of its own, each section within its time, whatever fails."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from infini_ds.benchmarks.gpu.comparison import CheckResult
from infini_ds.benchmarks.gpu.sections import Case, Outcome, Section
from infini_ds.benchmarks.measure import parse_result
from infini_ds.benchmarks.results import OutOfMemory
from infini_ds.utils.errors import UserError

LEAST_SECONDS = 5.0  # to start a case with
SHARE_OF_A_CASE = 0.6  # of its section's seconds, at most: one that hangs leaves time for others
MEASUREMENTS = ("training", "generation", "profile")

Run = Callable[[str, dict[str, Any], float], dict[str, Any]]  # (kind, arguments, seconds) -> JSON of the worker


def run_sections(sections: Sequence[Section], seconds: float, run: Run) -> Iterator[Outcome]:
    """Yield the outcome of each case once it is known. Nothing that a case does ends the others.

    Args:
        seconds: for all sections together, divided as their own `seconds` are.
        run: runs a case; raises TimeoutError, UserError or any other exception.
    """
    started, scale = time.monotonic(), seconds / sum(section.seconds for section in sections)
    outcomes: list[Outcome] = []
    budget = 0.0
    for section in sections:
        budget += section.seconds * scale
        longest = SHARE_OF_A_CASE * section.seconds * scale
        for case in section.cases(outcomes):
            left = started + budget - time.monotonic()
            if left < min(LEAST_SECONDS, longest):
                outcome = Outcome(section.name, case, "out of time", 0.0, message="the section's time is over")
            else:
                outcome = run_case(section.name, case, min(left, max(longest, left / 2)), run)
            outcomes.append(outcome)
            yield outcome


def run_case(section: str, case: Case, seconds: float, run: Run) -> Outcome:
    """Run one case and return what became of it."""
    started = time.monotonic()

    def ended(state: str, result: Any = None, message: str = "") -> Outcome:
        return Outcome(section, case, state, time.monotonic() - started, result, message)

    try:
        content = run(case.kind, case.arguments, seconds)
    except TimeoutError as error:
        return ended("out of time", message=str(error))
    except UserError as error:
        return ended("not possible", message=str(error).removeprefix("--contenders "))
    except Exception as error:  # of the worker, with its output
        return ended("error", message=str(error) or type(error).__name__)
    if content.get("out_of_memory"):
        return ended("out of memory", OutOfMemory())
    if case.kind in MEASUREMENTS:
        return ended("measured", parse_result(case.kind, content))
    result = CheckResult.from_json(content)
    return ended("failed" if result.failed else "passed", result)


def is_failure(outcome: Outcome, sections: Sequence[Section]) -> bool:
    """Return whether the command's exit code has to report this outcome: an error, or a check that did not pass."""
    is_check = next(section.is_check for section in sections if section.name == outcome.section)
    return outcome.state in ("failed", "error") or (is_check and outcome.state in ("out of memory", "out of time"))
