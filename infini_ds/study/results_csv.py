"""Read and write a study's two tables. Both are tidy: one row a value, so that `pandas.read_csv` is all that is needed.

results.csv: one row for each run, step, task, setting of the memory and metric.
gates.csv: one row for each run, recorded step, layer and head; `gate` is sigmoid(beta), the weight of the memory.
"""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from infini_ds.study.results import Measurement, RunInfo, RunResult
from infini_ds.utils.atomic import write_text_atomic

RESULTS, GATES = "results.csv", "gates.csv"
RUN_COLUMNS = [column.name for column in dataclasses.fields(RunInfo) if column.name != "axes"]
ROW_COLUMNS = [column.name for column in dataclasses.fields(Measurement)]
GATE_COLUMNS = ["run", "step", "layer", "head", "gate"]


def write_results(results: list[RunResult], folder: Path) -> None:
    """Write results.csv and gates.csv. Floats are written with all digits, so reading them gives the same values."""
    axes = list(dict.fromkeys(axis for result in results for axis in result.run.axes))
    rows, gates = [], []
    for result in results:
        of_run = {name: getattr(result.run, name) for name in RUN_COLUMNS} | result.run.axes
        rows += [of_run | dataclasses.asdict(row) for row in result.measurements]
        for (layer, head), curve in result.gates.items():
            for step, gate in curve:
                values = (result.run.run, step, layer, head, gate)
                gates.append(dict(zip(GATE_COLUMNS, values, strict=True)))
    write_text_atomic(folder / RESULTS, _to_csv([*RUN_COLUMNS, *axes, *ROW_COLUMNS], rows))
    write_text_atomic(folder / GATES, _to_csv(GATE_COLUMNS, gates))


def read_results(folder: Path) -> list[RunResult]:
    """Read results.csv and gates.csv."""
    infos: dict[str, RunInfo] = {}
    measurements: dict[str, list[Measurement]] = {}
    for row in _read_csv(folder / RESULTS):
        name = row["run"]
        if name not in infos:
            infos[name] = _run_info(row)
        measurements.setdefault(name, []).append(_measurement(row))
    gates: dict[str, dict[tuple[int, int], list[tuple[int, float]]]] = {name: {} for name in infos}
    for row in _read_csv(folder / GATES):
        curve = gates[row["run"]].setdefault((int(row["layer"]), int(row["head"])), [])
        curve.append((int(row["step"]), float(row["gate"])))
    return [RunResult(info, tuple(measurements[name]), gates[name]) for name, info in infos.items()]


def _run_info(row: dict[str, str]) -> RunInfo:
    axes = {name: value for name, value in row.items() if name not in (*RUN_COLUMNS, *ROW_COLUMNS)}
    return RunInfo(
        run=row["run"],
        cell=row["cell"],
        arm=row["arm"],
        start_from=row["start_from"],
        seed=int(row["seed"]),
        steps=int(row["steps"]),
        segment_length=int(row["segment_length"]),
        context_length=int(row["context_length"]),
        memory_rule=row["memory_rule"],
        gate_schedule=row["gate_schedule"],
        axes=axes,
    )


def _measurement(row: dict[str, str]) -> Measurement:
    return Measurement(
        step=int(row["step"]),
        tokens=int(row["tokens"]),
        task=row["task"],
        setting=row["setting"],
        metric=row["metric"],
        value=float(row["value"]),
        sha256=row["sha256"],
    )


def _to_csv(columns: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)  # csv writes floats by repr(), which keeps all digits
    return text.getvalue()


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
