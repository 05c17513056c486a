"""Many runs at once, with commands that take no time: failures, signals, and what is left to do."""

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import ROOT, call_script

from infini_ds.study.commands import Command, Scripts, StudyCommands
from infini_ds.study.grid import expand
from infini_ds.study.local_runner import ChildProcesses, StudyStopped, execute_runs
from infini_ds.study.study_config import load_study

SMALL = "launch/studies/small.yaml"


@dataclass(frozen=True)
class ShellCommands(StudyCommands):
    """In place of training, each run is a shell command, which then creates the run's export."""

    shell: dict[str, str] = field(default_factory=dict)

    def for_run(self, run):
        partial = run.folder / "partial"
        export = f"mkdir -p {partial} && echo '{{}}' > {partial}/config.json && mv {partial} {run.export}"
        text = f"{self.shell.get(run.name, 'true')} && {export}"
        return [Command("training", ("bash", "-c", text), run.export.is_dir)]


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A study of two plain runs and four that start from them, and a function that executes it."""
    monkeypatch.chdir(ROOT)
    grid = "arms.finetune.grid=[{model.segment_length: [32, 64], seed: [0, 1]}]"
    study = load_study(SMALL, [f"output={tmp_path}", grid])
    study = study.model_copy(update={"arms": {arm: study.arms[arm] for arm in ("base", "finetune")}})
    runs = expand(study)

    def execute(shell: dict[str, str], children: ChildProcesses | None = None):
        commands = ShellCommands(study, Scripts(*[Path("none.py")] * 3), shell)
        return execute_runs(commands, runs, children or ChildProcesses(), jobs=2, gpus=0)

    return SimpleNamespace(runs=runs, execute=execute)


def test_a_run_that_fails_does_not_stop_the_others(quick, capsys):
    failures = quick.execute({"base-plain-c512-seed1": "echo broken; exit 3"})
    assert "6 to do, 2 at once" in capsys.readouterr().out
    assert {failure.run for failure in failures} == {run.name for run in quick.runs if run.recipe.seed == 1}
    broken = next(failure for failure in failures if failure.run == "base-plain-c512-seed1")
    assert "training failed with exit code 3" in str(broken) and "broken" in broken.log.read_text()
    assert all("which it starts from, failed" in str(f) for f in failures if f is not broken)
    assert all(run.export.is_dir() for run in quick.runs if run.recipe.seed == 0)

    assert quick.execute({}) == [] and "3 to do" in capsys.readouterr().out
    assert all(run.export.is_dir() for run in quick.runs)


def test_a_signal_stops_the_running_commands(quick, tmp_path):
    """The command receives SIGTERM, and the next call resumes."""
    children, begun = ChildProcesses(), tmp_path / "begun"
    waiting = f"trap 'echo > {tmp_path}/received; exit 75' TERM; touch {begun}; while true; do sleep 0.05; done"

    def send_signal() -> None:
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        children.install_signal_handlers()
        threading.Thread(target=send_signal, daemon=True).start()
        with pytest.raises(StudyStopped):
            quick.execute({"base-plain-c512-seed0": waiting}, children)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (tmp_path / "received").exists() and not quick.runs[0].export.is_dir()
    assert quick.execute({}) == []


def test_the_script_prints_mistakes_as_a_sentence(tmp_path):
    unknown = call_script("launch/study.py", SMALL, f"output={tmp_path}", "--run", "finetune-s32", code=2).stderr
    assert unknown.startswith("error: --run finetune-s32 is not a run of this study: did you mean finetune-")
    assert "nothing to report" in call_script("launch/study.py", SMALL, f"output={tmp_path}", "--report", code=2).stderr
    early = call_script("launch/study.py", SMALL, f"output={tmp_path}", "--run", "7", code=2).stderr
    assert "starts from base-plain-c512-seed0, which is not finished" in early


def test_the_script_lists_the_runs(tmp_path):
    table = call_script("launch/study.py", SMALL, f"output={tmp_path}", "--list").stdout
    assert "22 runs" in table and "pretrain-s128-c512-linear-decayed-seed1" in table
