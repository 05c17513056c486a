"""Scripts that are given no model take the newest run, and print which."""

import os
import shutil
from pathlib import Path

import pytest
from harness import call_script

from infini_ds.checkpoint.manifest import MANIFEST, complete_checkpoints
from infini_ds.conversion.locate import newest_run
from infini_ds.utils.errors import UserError


@pytest.fixture
def folder(runs, tmp_path, monkeypatch) -> Path:
    """A current folder with runs/one and runs/two, of which one was saved last, and an unfinished run."""
    for name in ("one", "two"):
        shutil.copytree(runs / name, tmp_path / "runs" / name, ignore=shutil.ignore_patterns("export", "evaluation"))
    for seconds, name in enumerate(("two", "one")):
        newest = complete_checkpoints(tmp_path / "runs" / name)[-1]
        os.utime(newest / MANIFEST, (1e9 + seconds, 1e9 + seconds))
    (tmp_path / "runs" / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "begun" / "recipe.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_newest_run_is_the_one_that_saved_last(folder):
    assert newest_run() == Path("runs/one")
    newest = complete_checkpoints(folder / "runs" / "two")[-1]
    os.utime(newest / MANIFEST)
    assert newest_run() == Path("runs/two")
    with pytest.raises(UserError, match="no model is named, and elsewhere/ holds no run with a complete checkpoint"):
        newest_run(Path("elsewhere"))


def test_convert_report_and_evaluate_with_nothing(folder):
    taking = "taking the newest run, runs/one\n"
    done = call_script("launch/convert.py")
    assert done.stdout == f"{taking}written: runs/one/export\n"
    assert (folder / "runs/one/export/model.safetensors").exists()
    done = call_script("launch/report.py", "--rows", "2")
    assert done.stdout.startswith(taking) and "model folder  runs/one/export" in done.stdout
    done = call_script("launch/evaluate.py", "--rows", "2")
    assert done.stdout.startswith(taking) and "Written to runs/one/evaluation" in done.stdout
    checkpoint = complete_checkpoints(Path("runs/two"))[-1]
    assert "give --out FOLDER" in call_script("launch/convert.py", checkpoint, code=2).stderr


def test_generate_with_nothing_begins_a_document(folder, monkeypatch):
    """At a terminal, or with standard input closed, as `python launch/generate.py <&-` has it."""
    monkeypatch.setattr("sys.stdin", None)
    greedy = ["--temperature", "0", "--max-new-tokens", "12"]
    done = call_script("launch/generate.py", *greedy)
    assert done.stderr == "taking the newest run, runs/one\n"
    assert len(done.stdout) > 6 and done.stdout == call_script("launch/generate.py", "runs/one", *greedy).stdout
