"""A study that is really trained, six runs of eight steps, with one more that is left to do."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import SHAPE, build, call_script

from infini_ds.distributed import environment as distributed_environment
from infini_ds.study.commands import Scripts, StudyCommands
from infini_ds.study.grid import expand
from infini_ds.study.local_runner import ChildProcesses, execute_run
from infini_ds.study.study_config import load_study

SCRIPTS = Scripts(Path("launch/pretrain.py"), Path("launch/convert.py"), Path("launch/evaluate.py"))


class InThisProcess(ChildProcesses):
    """Runs the scripts in this process, which saves the seconds of their imports."""

    def __init__(self):
        super().__init__()
        self.called: list[tuple[str, ...]] = []

    def run(self, arguments, environment, log=None) -> int:
        self.called.append(arguments)
        if arguments[1] == str(SCRIPTS.pretrain):
            at = arguments.index("--config") if "--config" in arguments else None
            overrides = list(arguments[2 if at is None else at + 2 :])
            trainer = build(*overrides, config=at and arguments[at + 1])
            assert trainer is not None, "the run is complete"
            return 0 if trainer.fit() else 75
        call_script(*arguments[1:])
        return 0


@pytest.fixture(scope="session")
def trained(shards, tmp_path_factory):
    """The study, its commands and runs; the last run is left to do."""
    output = tmp_path_factory.mktemp("studies")
    shape = dict(word.split("=") for word in SHAPE[1:])
    steps = {"steps": 8, "batch.rows": 2, "log_every": 1, "validation.every": 4, "validation.rows": 2}
    steps |= {"schedule.warmup_steps": 2, "checkpoint.every": 4, "checkpoint.keep_every": 4}
    content = {
        "name": "trained",
        "output": str(output),
        "context_length": 256,
        "recipe": steps,
        "data": {"source": "text:gone"},
        "evaluation": {"along": [], "options": {"rows": 2}},
        "arms": {
            "base": {"recipe": shape | {"model.segment_length": 256}, "grid": [{"seed": [0, 1]}]},
            "finetune": {"start_from": "base", "grid": [{"model.segment_length": [32, 256], "seed": [0, 1]}]},
            "pretrain": {"recipe": shape, "grid": [{"model.segment_length": [32], "seed": [0]}]},
        },
    }
    (output / "study.yaml").write_text(json.dumps(content))
    study = load_study(output / "study.yaml")
    runs, commands, children = expand(study), StudyCommands(study, SCRIPTS), InThisProcess()
    study.data_folder(256).parent.mkdir(parents=True)
    study.data_folder(256).symlink_to(shards)
    shutdown = distributed_environment.shutdown
    distributed_environment.shutdown = lambda: None  # the next run continues in this process
    try:
        for run in runs[:-1]:
            assert execute_run(commands, run, children, {}) is None
    finally:
        distributed_environment.shutdown = shutdown
    return SimpleNamespace(commands=commands, study=study, runs=runs, children=children)
