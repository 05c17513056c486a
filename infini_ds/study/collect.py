"""Collect a study's results from the folders of its runs: metrics.jsonl, evaluation.json and so on."""

import json
import math
import platform
import re
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from infini_ds.config.lr_schedule import gate_reach
from infini_ds.evaluation.evaluation_file import Evaluation, read_evaluation
from infini_ds.evaluation.task import TASKS
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.study.commands import StudyCommands
from infini_ds.study.grid import Run, other_axes
from infini_ds.study.provenance import EvaluationData, Provenance, RunRecord
from infini_ds.study.results import MAX_GATE_CHANGE, OFF, ON, Measurement, RunInfo, RunResult
from infini_ds.study.run_folder import evaluation_folder
from infini_ds.study.study_config import Study
from infini_ds.utils.hashing import sha256_of_file, sha256_of_json

GATE = re.compile(r"gate/layer_(\d+)/head_(\d+)")
# Name in metrics.jsonl -> task, setting of the memory, metric.
RECORDED = {
    "train/loss": ("training", ON, "loss"),
    "validation/loss": ("validation", ON, "loss"),
    "validation/loss_memory_off": ("validation", OFF, "loss"),
}
LIBRARIES = ("torch", "transformers", "deepspeed")

Metrics = list[dict[str, float]]
Value = tuple[str, str, str, float]  # task, setting, metric, value


def collect_results(study: Study, runs: list[Run]) -> list[RunResult]:
    """Return the results of the runs that are trained and exported, in their order."""
    results: dict[str, RunResult] = {}
    for run in runs:
        if run.export.is_dir():
            start = results.get(run.start.name) if run.start else None
            results[run.name] = _collect_run(study, run, start)
    return list(results.values())


def _collect_run(study: Study, run: Run, start: RunResult | None) -> RunResult:
    metrics = read_metrics(run.folder)
    tokens = _TokenCount(metrics, start.tokens if start else 0)
    half = run.recipe.steps // 2
    found: list[tuple[int, Value]] = [
        (step, ("gates", ON, MAX_GATE_CHANGE, gate_reach(run.recipe, step))) for step in (half, run.recipe.steps)
    ]
    for line in metrics:
        found += [(int(line["step"]), (*RECORDED[name], line[name])) for name in RECORDED if name in line]
    hashes: dict[int, str] = {}
    for step in run.evaluated_steps:
        if evaluation := read_evaluation(evaluation_folder(run, step)):
            hashes[step] = evaluation.model.sha256
            found += [(step, value) for value in evaluation_values(evaluation)]
    if run.recipe.steps not in hashes:
        hashes[run.recipe.steps] = exported_sha256(run)
    measurements = tuple(
        Measurement(step, tokens.at(step), *value, sha256=hashes.get(step, "")) for step, value in found
    )
    return RunResult(_run_info(study, run), measurements, gate_curves(run, metrics, start))


def _run_info(study: Study, run: Run) -> RunInfo:
    return RunInfo(
        run=run.name,
        cell=run.cell,
        arm=run.arm,
        start_from=run.start.name if run.start else "",
        seed=run.recipe.seed,
        steps=run.recipe.steps,
        segment_length=run.segment_length,
        context_length=run.context_length,
        memory_rule=run.memory_rule,
        gate_schedule=run.gate_schedule,
        axes={axis: run.recipe_value(axis) for axis in other_axes(study)},
    )


class _TokenCount:
    """Tokens that the weights have seen at a step, including those of the run that this one starts from."""

    def __init__(self, metrics: Metrics, tokens_before: int):
        self.recorded = {int(line["step"]): int(line["train/tokens"]) for line in metrics if "train/tokens" in line}
        self.tokens_before = tokens_before

    def at(self, step: int) -> int:
        """Steps that were not logged are interpolated: each step has the same number of rows."""
        if step in self.recorded:
            return self.tokens_before + self.recorded[step]
        last = max(self.recorded)
        return self.tokens_before + round(step * self.recorded[last] / last)


def gate_curves(run: Run, metrics: Metrics, start: RunResult | None) -> dict[tuple[int, int], list[tuple[int, float]]]:
    """Return (layer, head) -> [(step, gate)], from step 0 on, where the gate is that of the run it starts from."""
    initial = 1 / (1 + math.exp(-run.gate_init))
    curves: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for line in metrics:
        for name, gate in line.items():
            if match := GATE.fullmatch(name):
                head = int(match[1]), int(match[2])
                if head not in curves:
                    inherited = start.gates.get(head) if start else None
                    curves[head] = [(0, inherited[-1][1] if inherited else initial)]
                curves[head].append((int(line["step"]), gate))
    return curves


def evaluation_values(evaluation: Evaluation) -> Iterator[Value]:
    """Yield the values of each task of an evaluation: its headline score and its parts."""
    for task in evaluation.tasks:
        if task in TASKS and (result := evaluation.result(task)):
            for row in result.tidy_rows():
                yield task, row.setting, row.metric, row.value


def collect_provenance(commands: StudyCommands, runs: list[Run], failures: dict[str, str]) -> Provenance:
    """Describe where the results come from.

    Args:
        failures: name of a run -> why it failed, of the runs that were tried now.
    """
    study = commands.study
    exported = [run for run in runs if run.export.is_dir()]
    evaluations = [
        evaluation
        for run in exported
        for step in run.evaluated_steps
        if (evaluation := read_evaluation(evaluation_folder(run, step)))
    ]
    return Provenance(
        study=study.name,
        context_length=study.context_length,
        preset=runs[0].recipe.model.preset,
        parameters=max((evaluation.model.parameters for evaluation in evaluations), default=0),
        source=str(study.data["source"]),
        document_tokens=_document_tokens(exported[0]) if exported else 0.0,
        runs=tuple(_run_record(commands, run, failures.get(run.name, "")) for run in runs),
        headlines=_headlines(evaluations),
        evaluation_data=_evaluation_data(evaluations),
        versions={"Python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        written=time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    )


def _run_record(commands: StudyCommands, run: Run, failure: str) -> RunRecord:
    return RunRecord(
        number=run.number,
        name=run.name,
        seed=run.recipe.seed,
        data_seed=run.recipe.data.seed,
        steps=run.recipe.steps,
        finished=commands.is_done(run),
        failure=failure,
        data_sha256=_data_sha256(run) if run.export.is_dir() else "",
        commands=tuple(map(str, commands.for_run(run))),
    )


def exported_sha256(run: Run) -> str:
    """Return the SHA-256 of the exported weights' files."""
    hashes = [sha256_of_file(file) for file in sorted(run.export.glob("*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else sha256_of_json(hashes)


def _data_manifest(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "data_manifest.json").read_text())


def _data_sha256(run: Run) -> str:
    return ", ".join(stream["shards"] for stream in _data_manifest(run)["fingerprint"]["streams"])


def _document_tokens(run: Run) -> float:
    counts = _data_manifest(run)["streams"][0]["manifest"]["train"]
    return counts["tokens"] / counts["documents"]


def _evaluation_data(evaluations: Sequence[Evaluation]) -> tuple[EvaluationData, ...]:
    found = {
        (task, str(data["path"]), str(data["sha256"]))
        for evaluation in evaluations
        for task, result in evaluation.tasks.items()
        if (data := result.get("data"))
    }
    return tuple(EvaluationData(*each) for each in sorted(found))


def _headlines(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Return for each evaluated task the name of the metric that stands for it."""
    headlines = {}
    for evaluation in evaluations:
        for task in evaluation.tasks:
            if task in TASKS and (result := evaluation.result(task)):
                headlines[task] = TASKS[task].headline(result).name
    return headlines
