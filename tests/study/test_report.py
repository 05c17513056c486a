"""A study that is really trained: what is skipped and refused, its tables, and the report that is made from them."""

import json
import math
import re
import shutil
from dataclasses import replace

import pandas
import pytest
from harness import ROOT

from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.study.collect import collect_results
from infini_ds.study.commands import Scripts, StudyCommands
from infini_ds.study.grid import expand
from infini_ds.study.local_runner import execute_run
from infini_ds.study.provenance import PROVENANCE
from infini_ds.study.report import report_study, write_report
from infini_ds.study.results_csv import GATES, RESULTS, read_results
from infini_ds.study.run_folder import DEFINITION, check_definition, definition, evaluation_folder, model_folder
from infini_ds.study.study_config import load_study
from infini_ds.utils.errors import UserError

SCRIPTS = Scripts(*[ROOT / "none.py"] * 3)


@pytest.fixture(scope="module")
def report(trained):
    """The report of the finished runs."""
    return report_study(trained.commands, trained.runs, {})


def test_finished_commands_are_skipped(trained):
    before = len(trained.children.called)
    for run in trained.runs[:-1]:
        assert trained.commands.is_done(run)
        assert execute_run(trained.commands, run, trained.children, {}) is None
    assert len(trained.children.called) == before
    assert not trained.commands.is_done(trained.runs[-1])
    evaluation = trained.study.evaluation.model_copy(update={"options": {"rows": 1}})
    other = trained.study.model_copy(update={"evaluation": evaluation})
    assert not StudyCommands(other, trained.commands.scripts).is_done(trained.runs[0]), "evaluated with other options"


def test_a_changed_study_under_the_same_name_is_refused(trained):
    file = trained.study.folder.parent / "study.yaml"
    for run in expand(load_study(file)):
        check_definition(run)
    changed = expand(load_study(file, ["recipe.optimizer.learning_rate=0.5"]))
    with pytest.raises(UserError, match=r"optimizer.learning_rate=0.5, but .* was begun with 0.001: .* another name="):
        check_definition(changed[0])


def test_a_run_of_an_earlier_version_resumes_or_is_refused(trained, tmp_path):
    """Keys had other names, or did not exist yet; a key that no longer exists is an error."""
    run = trained.runs[0]
    now = definition(run)
    earlier = {"guard.skipped_in_a_row": now["recipe"].pop("stability.max_consecutive_skips")}
    assert now["recipe"].pop("timeout_minutes") == 30.0  # the default
    moved = replace(run, recipe=run.recipe.model_copy(update={"output": str(tmp_path)}))
    moved.folder.mkdir()
    (moved.folder / DEFINITION).write_text(json.dumps(now | {"recipe": now["recipe"] | earlier}))
    check_definition(moved)
    (moved.folder / DEFINITION).write_text(json.dumps(now | {"recipe": now["recipe"] | {"schedule.shape": "cosine"}}))
    with pytest.raises(UserError, match=r"unknown key schedule.shape in .*: this run was begun with another version"):
        check_definition(moved)


def test_fine_tuning_begins_where_the_plain_model_ended(trained):
    """A plain run never reads its memory, so its gates stay, and fine-tuning it as it is changes nothing at step 0."""
    base, tuned = (
        next(run for run in trained.runs if run.arm == arm and not run.uses_memory and run.recipe.seed == 0)
        for arm in ("base", "finetune")
    )
    last, first = read_metrics(base.folder)[-1], read_metrics(tuned.folder)[0]
    assert last["step"] == 8 and first["step"] == 0
    assert first["validation/loss"] == pytest.approx(last["validation/loss"], abs=1e-6)
    assert last["validation/loss"] == last["validation/loss_memory_off"]
    gates = {name: gate for line in read_metrics(base.folder) for name, gate in line.items() if "/head_" in name}
    assert set(gates.values()) == {0.5}
    with_memory = next(run for run in trained.runs if run.arm == "finetune" and run.uses_memory)
    assert json.loads((model_folder(with_memory, 0) / "config.json").read_text())["segment_length"] == 32


def test_tables_hold_what_the_runs_recorded(trained, report):
    results = {result.run.run: result for result in read_results(report.parent)}
    assert list(results.values()) == collect_results(trained.study, trained.runs)
    run = next(run for run in trained.runs if run.arm == "finetune" and run.uses_memory)
    result, metrics = results[run.name], read_metrics(run.folder)
    losses = {line["step"]: line["validation/loss"] for line in metrics if "validation/loss" in line}
    assert result.curve("validation", "loss") == losses and list(losses) == [0, 4, 8]
    assert result.tokens_at == {0: 8 * 2 * 256, **{step: (8 + step) * 2 * 256 for step in range(1, 9)}}
    evaluation = json.loads((evaluation_folder(run, 8) / "evaluation.json").read_text())
    assert result.last("position", "loss", "off") == evaluation["tasks"]["position"]["memory"]["off"]["loss"]
    assert result.sha256 == evaluation["model"]["sha256"]
    assert result.gates[1, 0] == [
        (0, 0.5),
        *((line["step"], line["gate/layer_1/head_0"]) for line in metrics if "gate/layer_1/head_0" in line),
    ]


def test_the_report_gives_what_was_measured(trained, report):
    text, html = report.with_suffix(".md").read_text(), report.read_text()
    images = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert len(images) >= 4 and all((report.parent / image).stat().st_size > 10_000 for image in images)
    assert html.count("data:image/png;base64,") == len(images)
    assert not re.search(r'(src|href)="(?!data:)', html), "it needs no other file"

    finetuned = [run for run in trained.runs if run.name.startswith("finetune-s32")]
    losses = [read_metrics(run.folder)[-1]["validation/loss"] for run in finetuned]
    mean, deviation = sum(losses) / 2, abs(losses[0] - losses[1]) / math.sqrt(2)
    assert f"{mean:.4f} ± {deviation:.4f}" in text
    for published in ("0.572", "0.574", "0.549", "0.589"):
        assert published in text
    assert "**BLiMP** was not evaluated" in text and "33% of comparisons" in text
    assert f"### Not finished\n\n- {trained.runs[-1].name}" in text
    for run in trained.runs[:-1]:
        evaluation = json.loads((evaluation_folder(run, 8) / "evaluation.json").read_text())
        assert evaluation["model"]["sha256"][:16] in text and f"name={run.name}" in text


def test_the_report_is_made_from_the_tables_alone(report, tmp_path):
    for name in (RESULTS, GATES, PROVENANCE):
        shutil.copy(report.parent / name, tmp_path)
    again = write_report(tmp_path)
    assert again.with_suffix(".md").read_text() == report.with_suffix(".md").read_text()
    assert again.read_text() == report.read_text(), "figures included"


def test_a_table_is_redone_with_pandas(report):
    rows = pandas.read_csv(report.parent / RESULTS)
    losses = rows[(rows.task == "validation") & (rows.metric == "loss") & (rows.step == rows.steps)]
    table = losses.groupby(["cell", "setting"]).value.agg(["mean", "std"])
    text = report.with_suffix(".md").read_text()
    for cell in losses[(losses.arm == "finetune") & (losses.segment_length < losses.context_length)].cell.unique():
        on, off = (table.loc[cell, setting] for setting in ("on", "off"))
        shown = f"{on['mean']:.4f} ± {on['std']:.4f} | {off['mean']:.4f} ± {off['std']:.4f}"
        assert f"| {cell} | 2 | 0.01M | {shown} |" in text


def test_nothing_is_collected_before_runs_are_finished(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study("launch/studies/small.yaml", [f"output={tmp_path}"])
    runs = expand(study)
    commands = StudyCommands(study, SCRIPTS)
    assert collect_results(study, runs) == [] and not any(commands.is_done(run) for run in runs)
    assert not any(command.is_done() for command in commands.for_run(runs[0]))
    assert runs[0].folder.parent == tmp_path / "small" / "runs"
