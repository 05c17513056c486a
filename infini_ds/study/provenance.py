"""Where a study's numbers come from: model, data, versions, and for each run its seeds, data, commands and state."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from infini_ds.utils.atomic import write_json_atomic

PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class RunRecord:
    number: int
    name: str
    seed: int  # of the weights
    data_seed: int  # of the order of rows
    steps: int
    finished: bool
    failure: str  # why it is not finished, if it was tried
    data_sha256: str  # of the training shards, "" if it is not trained
    commands: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationData:
    """The data that a task of the evaluation was computed on."""

    task: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Provenance:
    study: str
    context_length: int  # tokens in a row, where it is no axis of the grid
    preset: str
    parameters: int  # of the largest model; 0 if none was evaluated
    source: str  # of the text
    document_tokens: float  # mean tokens in a document of the training text
    runs: tuple[RunRecord, ...]
    headlines: dict[str, str]  # task of the evaluation -> the metric that stands for it
    evaluation_data: tuple[EvaluationData, ...]
    versions: dict[str, str]
    written: str  # UTC


def write_provenance(provenance: Provenance, folder: Path) -> None:
    write_json_atomic(folder / PROVENANCE, dataclasses.asdict(provenance))


def read_provenance(folder: Path) -> Provenance:
    content = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    runs = tuple(RunRecord(**{**run, "commands": tuple(run["commands"])}) for run in content["runs"])
    evaluation_data = tuple(EvaluationData(**data) for data in content["evaluation_data"])
    return Provenance(**{**content, "runs": runs, "evaluation_data": evaluation_data})
