"""The study: what a grid expands to, what is skipped and refused, and the report of a grid that was really trained."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import ROOT, SHAPE, build, call_script
from hypothesis import given
from hypothesis import strategies as st

from data_prep.__main__ import parse
from infini_ds.config.recipe import load_recipe
from infini_ds.distributed import environment as processes
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.study import local_runner as local
from infini_ds.study.commands import (
    Step,
    check_definition,
    data_steps,
    evaluation_folder,
    is_done,
    model_at,
    run_steps,
)
from infini_ds.study.grid import expand, flat, load_study
from infini_ds.study.local_runner import Children, Stopped, make_all, make_run
from infini_ds.study.report import write_report
from infini_ds.study.results import Result, Spread, chance_apart, collect, movement
from infini_ds.study.slurm import ranges, submission
from infini_ds.utils.errors import UserError

GRIDS = sorted((ROOT / "launch" / "studies").glob("*.yaml"))
SMALL = "launch/studies/small.yaml"


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_shipped_grid_is_sound(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    runs = expand(study)
    assert study.name == path.stem and [run.number for run in runs] == list(range(1, len(runs) + 1))
    for arm in ("pretrain", "finetune"):
        of_arm = [run for run in runs if run.arm == arm and not run.is_plain]
        assert len({run.recipe.seed for run in of_arm}) >= 2 and len({run.segment_length for run in of_arm}) >= 2
    assert {run.gates for run in runs} == {"decayed", "constant"}
    assert {run.memory_rule for run in runs} == {"linear", "delta"}
    assert len({run.context_length for run in runs}) >= 2
    assert [parse(list(step.command[3:])).sequence_length for step in data_steps(study, runs)] == list(
        dict.fromkeys(run.context_length for run in runs)
    )


def test_fine_tuning_goes_on_from_a_plain_run_of_its_seed(monkeypatch):
    """And pre-training sees as many tokens as both together."""
    monkeypatch.chdir(ROOT)
    runs = expand(load_study(SMALL))
    tuned = [run for run in runs if run.arm == "finetune"]
    pretrained = [run for run in runs if run.arm == "pretrain"]
    for run in tuned:
        assert run.start.is_plain and run.start.recipe.seed == run.recipe.seed and run.start.number < run.number
        assert f"model.start_from={run.start.export}" in run.overrides
        assert run.recipe.data.seed != run.start.recipe.data.seed
        assert run.evaluated_steps[0] == 0 and run.evaluated_steps[-1] == run.recipe.steps
        assert all(run.recipe.steps + run.start.recipe.steps == other.recipe.steps for other in pretrained)
    assert {run.recipe.batch.tokens for run in runs} == {4096}
    for run in (runs[0], tuned[0], pretrained[-1]):
        assert load_recipe(run.config, list(run.overrides)) == run.recipe


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("nme=x", ["nme", "did you mean name?"]),
        ("armz=1", ["armz", "did you mean arms?"]),
        ("name=a/b", ["name='a/b'", "output="]),
        ("data.sourcee=x", ["data.sourcee", "did you mean data.source?"]),
        ("config=none.yaml", ["none.yaml", "there is no such file"]),
        ("recipe.stepz=3", ["arm base", "stepz", "did you mean steps?"]),
        ("recipe.name=x", ["name is set by the study"]),
        ("arms.finetune.start_from=bas", ["arms.finetune.start_from=bas is no arm", "did you mean base?"]),
        ("arms.base.start_from=finetune", ["starts from itself"]),
        ("arms.finetune.grd=[]", ["grd", "Did you mean: 'grid'"]),
        ("arms.finetune.grid=[{model.segmnt_length: [3]}]", ["model.segmnt_length", "model.segment_length"]),
        ("arms.finetune.grid=[{seed: 3}]", ["seed=3", "list of values"]),
        ("arms.finetune.grid=[{seed: [7]}]", ["no run of arm base", "seed=7"]),
        ("arms.finetune.grid=[]", ["arms.finetune.grid is empty"]),
        ("arms.finetune.grid=[{model.segment_length: [1024], seed: [0]}]", ["1024 is longer than a row of 512"]),
        ("arms.finetune.grid=[{context_length: [x], seed: [0]}]", ["context_length=x", "number of tokens"]),
        ("arms.finetune.grid=[{data.seed: [4, 5], seed: [0]}, {seed: [0], data.seed: [4]}]", []),
        ("arms.base.grid=[{seed: [0, 1], model.preset: [tiny, 33m]}]", ["no run of arm base", "model.preset=None"]),
    ],
)
def test_mistakes_get_a_sentence(override, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    if not words:
        tuned = [run for run in expand(load_study(SMALL, [override])) if run.arm == "finetune"]
        assert len(tuned) == 2  # a combination that two products give is one run
        return
    with pytest.raises(UserError) as error:
        expand(load_study(SMALL, [override]))
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_the_script_says_mistakes_in_a_sentence(tmp_path):
    asked = call_script("launch/study.py", SMALL, f"output={tmp_path}", "--run", "finetune-s32", code=2).stderr
    assert asked.startswith("error: --run finetune-s32: there is no such run; did you mean finetune-")
    assert "nothing to report" in call_script("launch/study.py", SMALL, f"output={tmp_path}", "--report", code=2).stderr
    started = call_script("launch/study.py", SMALL, f"output={tmp_path}", "--run", "7", code=2).stderr
    assert "starts from base-plain-c512-seed0, which is not finished" in started


@given(st.sets(st.integers(1, 60), min_size=1))
def test_ranges_name_all_numbers(numbers):
    found = []
    for part in ranges(sorted(numbers)).split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    assert found == sorted(numbers)


def test_slurm_waits_for_what_a_stage_starts_from(tmp_path, monkeypatch):
    """The script runs against an `sbatch` that notes what it is called with."""
    monkeypatch.chdir(ROOT)
    call = [SMALL, f"output={tmp_path}", "data.document_separator=<|end of text|>"]
    study = load_study(*call[:1], call[1:])
    (tmp_path / "submit.sh").write_text(submission(study, expand(study), call))
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$NOTES"\nwc -l < "$NOTES"\n')
    (tmp_path / "sbatch").chmod(0o755)
    notes = tmp_path / "notes"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(notes)}
    subprocess.run(["bash", str(tmp_path / "submit.sh"), "--partition=gpu"], env=environment, check=True)
    data, first, second, report = notes.read_text().splitlines()
    assert data.endswith("--prepare") and "--partition=gpu" in data and call[2] in data
    assert "--dependency=afterok:1 --array=1-6" in first
    assert "--dependency=afterany:2 --array=7-22" in second
    assert "--dependency=afterany:3" in report and report.endswith("--report")
    for script in (tmp_path / "submit.sh", ROOT / "launch/slurm/study.sbatch"):
        subprocess.run(["bash", "-n", str(script)], check=True)


# Many runs at once, with commands that take no time


def quick_steps(commands: dict[str, str]):
    """In place of training: each run is a shell command, which makes its export."""

    def steps_of(study, run):
        command = commands.get(run.name, "true") + f" && mkdir -p {run.export}"
        return [Step("training", ("bash", "-c", command), run.export.is_dir)]

    return steps_of


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A grid of two plain runs and four that start from them, and a function that makes all of it."""
    monkeypatch.chdir(ROOT)
    grid = "arms.finetune.grid=[{model.segment_length: [32, 64], seed: [0, 1]}]"
    study = load_study(SMALL, [f"output={tmp_path}", grid])
    study = replace(study, arms={arm: study.arms[arm] for arm in ("base", "finetune")})
    runs = expand(study)

    def make(commands: dict[str, str], children: Children | None = None):
        for module in (local, sys.modules["infini_ds.study.commands"]):
            monkeypatch.setattr(module, "run_steps", quick_steps(commands))
        monkeypatch.setattr("infini_ds.study.commands.write_start", lambda run: None)
        return make_all(study, runs, children or Children(), jobs=2, gpus=0)

    return SimpleNamespace(runs=runs, make=make)


def test_a_run_that_fails_leaves_the_others_alone(quick, capsys):
    failures = quick.make({"base-plain-c512-seed1": "echo broken; exit 3"})
    assert "6 to do, 2 at once" in capsys.readouterr().out
    assert {failure.run for failure in failures} == {run.name for run in quick.runs if run.recipe.seed == 1}
    broken = next(failure for failure in failures if failure.run == "base-plain-c512-seed1")
    assert "training ended with exit code 3" in str(broken) and "broken" in broken.log.read_text()
    assert all("which it starts from, failed" in str(f) for f in failures if f is not broken)
    assert all(run.export.is_dir() for run in quick.runs if run.recipe.seed == 0)

    assert quick.make({}) == [] and "3 to do" in capsys.readouterr().out  # what is done is left as it is
    assert all(run.export.is_dir() for run in quick.runs)


def test_a_signal_stops_what_is_at_work(quick, tmp_path):
    """The command hears of it, and the next call goes on."""
    children, begun = Children(), tmp_path / "begun"
    waiting = f"trap 'echo heard > {tmp_path}/heard; exit 75' TERM; touch {begun}; while true; do sleep 0.05; done"

    def tell() -> None:
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        children.listen()
        threading.Thread(target=tell, daemon=True).start()
        with pytest.raises(Stopped):
            quick.make({"base-plain-c512-seed0": waiting}, children)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (tmp_path / "heard").exists() and not quick.runs[0].export.is_dir()
    assert quick.make({}) == []


# A grid that is really trained


class InThisProcess(Children):
    """Calls the scripts in this process, which saves the seconds of their imports."""

    def __init__(self):
        super().__init__()
        self.called: list[tuple[str, ...]] = []

    def call(self, command, environment, log=None) -> int:
        self.called.append(command)
        if command[1] == "launch/pretrain.py":
            at = command.index("--config") if "--config" in command else None
            trainer = build(*command[at + 2 if at else 2 :], config=at and command[at + 1])
            return 0 if trainer.fit() else 75
        call_script(command[1], *command[2:])
        return 0


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A study of six runs of eight steps."""
    output = tmp_path_factory.mktemp("studies")
    shape = dict(word.split("=") for word in SHAPE[1:])
    steps = {"steps": 8, "batch.rows": 2, "log_every": 1, "validation.every": 4, "validation.rows": 2}
    steps |= {"schedule.warmup_steps": 2, "checkpoint.every": 4, "checkpoint.keep_every": 4}
    grid = {
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
    (output / "grid.yaml").write_text(json.dumps(grid))
    study = load_study(output / "grid.yaml")
    runs = expand(study)
    study.data_folder(256).parent.mkdir(parents=True)
    study.data_folder(256).symlink_to(shards)
    children, shutdown = InThisProcess(), processes.shutdown
    processes.shutdown = lambda: None  # the next run goes on in this process
    try:
        for run in runs[:-1]:  # one is left to do
            assert make_run(study, run, children, {}) is None
    finally:
        processes.shutdown = shutdown
    return SimpleNamespace(study=study, runs=runs, children=children)


def test_what_is_done_is_skipped(trained):
    before = len(trained.children.called)
    for run in trained.runs[:-1]:
        assert is_done(trained.study, run)
        assert make_run(trained.study, run, trained.children, {}) is None
    assert len(trained.children.called) == before
    assert not is_done(trained.study, trained.runs[-1])
    other = replace(trained.study, evaluation=replace(trained.study.evaluation, options={"rows": 1}))
    assert not is_done(other, trained.runs[0])  # evaluated with other options


def test_a_changed_grid_under_the_same_name_is_refused(trained):
    grid = trained.study.folder.parent / "grid.yaml"
    for run in expand(load_study(grid)):
        check_definition(run)
    changed = expand(load_study(grid, ["recipe.optimizer.learning_rate=0.5"]))
    with pytest.raises(UserError, match=r"optimizer.learning_rate=0.5, but .* was begun with 0.001: .* another name="):
        check_definition(changed[0])


def test_fine_tuning_begins_where_the_plain_model_ended(trained):
    """A plain run never reads its memory, so its gates stay; with whole rows as segments nothing changes at step 0."""
    base, tuned = (
        next(r for r in trained.runs if r.arm == arm and r.is_plain and r.recipe.seed == 0)
        for arm in ("base", "finetune")
    )
    last, first = read_metrics(base.folder)[-1], read_metrics(tuned.folder)[0]
    assert last["step"] == 8 and first["step"] == 0
    assert first["validation/loss"] == pytest.approx(last["validation/loss"], abs=1e-6)
    assert last["validation/loss"] == last["validation/loss_memory_off"]
    gates = {name: gate for line in read_metrics(base.folder) for name, gate in line.items() if "/head_" in name}
    assert set(gates.values()) == {0.5}
    with_memory = next(run for run in trained.runs if run.arm == "finetune" and not run.is_plain)
    assert json.loads((model_at(with_memory, 0) / "config.json").read_text())["segment_length"] == 32


def test_the_report_says_what_was_measured(trained):
    page = write_report(trained.study, trained.runs, [])
    text, html = page.with_suffix(".md").read_text(), page.read_text()
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert len(pictures) >= 4 and all((page.parent / picture).stat().st_size > 10_000 for picture in pictures)
    assert html.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r'(src|href)="(?!data:)', html)  # it needs no other file

    losses = [
        read_metrics(run.folder)[-1]["validation/loss"] for run in trained.runs if run.name.startswith("finetune-s32")
    ]
    mean, deviation = sum(losses) / 2, abs(losses[0] - losses[1]) / math.sqrt(2)
    assert f"{mean:.4f} ± {deviation:.4f}" in text
    for published in ("0.572", "0.574", "0.549", "0.589"):
        assert published in text
    assert "**BLiMP** was not evaluated" in text and "33% of comparisons" in text
    assert f"### Not finished\n\n- {trained.runs[-1].name}" in text
    for run in trained.runs[:-1]:
        evaluation = json.loads((evaluation_folder(run, 8) / "evaluation.json").read_text())
        assert evaluation["model"]["sha256"][:16] in text and f"name={run.name}" in text


# Numbers


def test_spread_over_seeds():
    one, other = Spread((1.0, 3.0)), Spread((3.5, 4.0))
    assert one.mean == 2 and one.deviation == pytest.approx(math.sqrt(2)) and Spread((1.0,)).deviation is None
    assert one.apart_from(other) and other.apart_from(one) and not one.apart_from(Spread((2.0, 5.0)))
    assert chance_apart(2, 2) == pytest.approx(1 / 3) and chance_apart(5, 5) == pytest.approx(2 / 252)


@pytest.mark.parametrize(("until", "half"), [(100, 0.5), (50, 1.0)])
def test_movement_of_gates(until, half, monkeypatch):
    """Two heads that move as far up and down; until the end, or until half of the steps."""
    monkeypatch.chdir(ROOT)
    keys = ["recipe.steps=100", "recipe.schedule.warmup_steps=0", "recipe.optimizer.gate_learning_rate=0.01"]
    run = next(run for run in expand(load_study(SMALL, keys)) if run.gates == "constant")
    metrics = []
    for step in range(1, 101):
        beta = 0.02 * min(step, until)
        gates = {f"gate/layer_0/head_{head}": 1 / (1 + math.exp(-sign * beta)) for head, sign in enumerate((1, -1))}
        metrics.append({"step": step} | gates)
    moved = movement(Result(run, None, metrics, {}))
    assert moved.moved == pytest.approx(0.02 * until) and moved.path == pytest.approx(0.02 * until)
    assert moved.half == pytest.approx(half) and moved.reach == pytest.approx(1.0)
    assert moved.reach_half == pytest.approx(0.5)


def test_nothing_is_collected_of_runs_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(SMALL, [f"output={tmp_path}"])
    runs = expand(study)
    assert collect(runs) == [] and not any(is_done(study, run) for run in runs)
    assert all(not step.is_done() for step in run_steps(study, runs[0]))
    assert flat({"a": {"b": 1}, "c": 2}) == {"a.b": 1, "c": 2}
    assert Path(runs[0].folder).parent == tmp_path / "small" / "runs"
