"""The report on a GPU: JSON with everything, and Markdown tables for a document."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from infini_ds.benchmarks.gpu.comparison import CheckResult
from infini_ds.benchmarks.gpu.machine import Machine
from infini_ds.benchmarks.gpu.sections import Outcome, Section, best_setting
from infini_ds.benchmarks.profile_groups import shares
from infini_ds.benchmarks.results import GenerationSpeed, Profile, TrainingSpeed

BEGIN = '<!-- gpu: written by `make gpu ARGS="--write docs/performance.md"` -->'
END = "<!-- end of gpu -->"
MIB, GIB = 2**20, 2**30
MAX_KERNELS = 12  # of a profile that have a line of their own


@dataclass(frozen=True)
class Report:
    """Everything that one call of the command found. `date`: ISO 8601; `seconds`: that it took."""

    machine: Machine
    form: str
    date: str
    seconds: float
    sections: Sequence[Section]
    outcomes: Sequence[Outcome]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, in which a number that is not finite is null."""
        found = {
            "machine": asdict(self.machine),
            "form": self.form,
            "date": self.date,
            "seconds": self.seconds,
            "outcomes": [_outcome_json(one) for one in self.outcomes],
        }
        return {name: _finite(value) for name, value in found.items()}

    def markdown(self) -> str:
        """Return the tables, and what could not run."""
        parts = [self._heading()]
        for section in self.sections:
            outcomes = [one for one in self.outcomes if one.section == section.name]
            table = _check_table(outcomes) if section.is_check else _speed_table(section.name, outcomes)
            if section.name == "memory":
                table = _memory_table(outcomes)
            if table:
                parts.append(f"### {section.title}\n\n{table}")
        best = [one for name in _models(self.outcomes) if (one := best_setting(self.outcomes, name))]
        if best:
            lines = [f"{one.case.model}: `{one.case.label}`" for one in best]
            parts.append(f"The fastest way of each size: {', '.join(lines)}.")
        missing = list(_not_run(self.outcomes))
        if missing:
            parts.append("### What did not run\n\n" + "\n".join(missing))
        return "\n\n".join(parts) + "\n"

    def _heading(self) -> str:
        machine = self.machine
        packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
        count = f"{machine.devices} x " if machine.devices > 1 else ""
        used = ", one of which was used" if machine.devices > 1 else ""
        rates = [f"{rate / 1e12:.3g} TFLOP/s in {precision}" for precision, rate in machine.matrix_flops.items()]
        published = f" (published: {machine.published_flops / 1e12:.0f} in bf16)" if machine.published_flops else ""
        cuda = f"CUDA {machine.cuda}, compute capability {machine.capability}; " if machine.cuda else ""
        return (
            f"{count}{machine.device}{used}, {machine.memory / GIB:.1f} GiB; {cuda}{packages}. A large matrix product: "
            f"{', '.join(rates)}{published}. {self.date}, {self.form} form, {self.seconds / 60:.1f} minutes."
        )


def summary(outcome: Outcome) -> str:
    """Return what a line on the terminal says of an outcome."""
    result = outcome.result
    if isinstance(result, CheckResult) and result.failed:
        return "; ".join(f"{one.name} {_figure(one.value)}, {_bounds(one)}" for one in result.failed)
    if isinstance(result, TrainingSpeed):
        return f"{result.tokens_per_s:,.0f} tokens/s" + ("" if result.mfu is None else f", MFU {result.mfu:.1%}")
    if isinstance(result, GenerationSpeed):
        return f"{1e3 * result.seconds_per_token:.2f} ms a token"
    if isinstance(result, Profile):
        return ", ".join(f"{name} {share:.0%}" for name, share in list(shares(result).items())[:3])
    if isinstance(result, CheckResult):
        return "; ".join(result.unavailable)
    return _reason(outcome)


def _check_table(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        if not isinstance(outcome.result, CheckResult):
            rows.append((outcome.case.label, "", "", "", outcome.state))
            continue
        for one in outcome.result.comparisons:
            state = "passed" if one.passed else "**FAILED**"
            rows.append((outcome.case.label, one.name, _figure(one.value), _bounds(one), state))
    return _table("case", "compared", "found:", "allowed:", "result", rows=rows)


def _memory_table(outcomes: Sequence[Outcome]) -> str:
    rows: list[tuple[str, ...]] = []
    for outcome in outcomes:
        if not isinstance(outcome.result, CheckResult):
            rows.append((outcome.case.model, "", "", "", "", "", outcome.state))
            continue
        figures, (compared,) = outcome.result.figures, outcome.result.comparisons
        rows.append(
            (
                *(outcome.case.model, f"{figures['segments in a block']:.0f}"),
                *(f"{figures[name]:.2f}" for name in ("planned, GiB", "allocator's peak, GiB")),
                *(f"{figures['tokens/s']:,.0f}", f"{figures['MFU']:.1%}"),
                f"{compared.value:.3f}" + ("" if compared.passed else f" **FAILED** ({_bounds(compared)})"),
            )
        )
    heads = ("segments in a block:", "plan, GiB:", "allocator's peak, GiB:", "tokens/s:", "MFU:", "peak over plan:")
    return _table("model", *heads, rows=rows)


def _speed_table(name: str, outcomes: Sequence[Outcome]) -> str:
    if name == "profile":
        return "\n\n".join(_profile_tables(one) for one in outcomes)
    if name == "generation":
        rows = [(*_case(one), *_generation_row(one)) for one in outcomes]
        heads = ("ms/token:", "reading the prompt, tokens/s:", "cache, MiB:", "peak memory, MiB:")
        return _table("model", "prompt tokens:", "contender", *heads, rows=rows)
    rows = [(*_case(one), *_training_row(one)) for one in outcomes]
    return _table("model", "tokens:", "contender", "tokens/s:", "MFU:", "peak memory above the model, GiB:", rows=rows)


def _case(outcome: Outcome) -> tuple[str, str, str]:
    return outcome.case.model, f"{outcome.case.arguments['tokens']:,}", outcome.case.label


def _training_row(outcome: Outcome) -> tuple[str, ...]:
    result = outcome.result
    if not isinstance(result, TrainingSpeed):
        return outcome.state, "", ""
    mfu = "" if result.mfu is None else f"{result.mfu:.1%}"
    return f"{result.tokens_per_s:,.0f}", mfu, f"{result.peak_memory / GIB:.2f}"


def _generation_row(outcome: Outcome) -> tuple[str, ...]:
    result = outcome.result
    if not isinstance(result, GenerationSpeed):
        return outcome.state, "", "", ""
    cache, peak = (f"{size / MIB:,.1f}" for size in (result.cache_bytes, result.peak_memory))
    return f"{1e3 * result.seconds_per_token:.2f}", f"{result.reading_tokens_per_s:,.0f}", cache, peak


def _profile_tables(outcome: Outcome) -> str:
    model, tokens, label = _case(outcome)
    if not isinstance(outcome.result, Profile):
        return f"{model}, `{label}`, {tokens} tokens: {outcome.state}."
    profile = outcome.result
    total = sum(operator.seconds for operator in profile.operators)
    busy = "" if profile.busy is None else f" The GPU computes in {profile.busy:.1%} of the time of a step."
    groups = [(name, f"{share:.1%}") for name, share in shares(profile).items()]
    kernels = [
        (f"`{one.name[:80]}`", f"{one.calls:,}", f"{one.seconds / total:.1%}")
        for one in profile.operators[:MAX_KERNELS]
    ]
    tables = _table("what for", "share:", rows=groups), _table("operator", "calls:", "share:", rows=kernels)
    return f"{model}, `{label}`, {tokens} tokens.{busy}\n\n{tables[0]}\n\n{tables[1]}"


def _not_run(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield a line for each case, or part of one, that has no result."""
    for one in outcomes:
        name = " ".join(filter(None, (one.section + ":", one.case.model, one.case.label)))
        if isinstance(one.result, CheckResult):
            yield from (f"- {name}: {sentence}" for sentence in one.result.unavailable)
        elif one.state not in ("measured", "out of memory"):
            yield f"- {name}: {one.state}: {_reason(one)}"


def _reason(outcome: Outcome) -> str:
    """Return the message in one line: of an error the last one of its stack, which names it."""
    lines = outcome.message.strip().splitlines()
    return (lines[-1] if outcome.state == "error" else lines[0]) if lines else ""


def _models(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(one.case.model for one in outcomes if one.case.model))


def _figure(value: float) -> str:
    return f"{value:.3g}"


def _bounds(one: Any) -> str:
    bounds = [f"at least {_figure(one.at_least)}"] if one.at_least is not None else []
    bounds += [f"at most {_figure(one.at_most)}"] if one.at_most is not None else []
    return ", ".join(bounds)


def _table(*heads: str, rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; a head that ends in ":" is of a column of numbers. No rows give no table."""
    if not rows:
        return ""
    lines = [[head.rstrip(":") for head in heads], ["---:" if head.endswith(":") else "---" for head in heads], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    found = asdict(outcome)
    if isinstance(outcome.result, CheckResult):
        for one, content in zip(outcome.result.comparisons, found["result"]["comparisons"], strict=True):
            content["passed"] = one.passed
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
