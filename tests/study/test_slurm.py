"""The script that submits a study to Slurm."""

import os
import subprocess
from pathlib import Path

from harness import ROOT
from hypothesis import given
from hypothesis import strategies as st

from infini_ds.study.commands import Scripts, StudyCommands
from infini_ds.study.grid import expand
from infini_ds.study.slurm import format_ranges, submission_script
from infini_ds.study.study_config import load_study

SMALL = "launch/studies/small.yaml"
JOB = Path("launch/slurm/study.sbatch")
SCRIPTS = Scripts(Path("launch/pretrain.py"), Path("launch/convert.py"), Path("launch/evaluate.py"))


@given(st.sets(st.integers(1, 60), min_size=1))
def test_ranges_name_all_numbers(numbers):
    found: list[int] = []
    for part in format_ranges(sorted(numbers)).split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    assert found == sorted(numbers)


def test_a_stage_waits_for_the_one_that_it_starts_from(tmp_path, monkeypatch):
    """The script runs against an `sbatch` that records how it is called."""
    monkeypatch.chdir(ROOT)
    arguments = [SMALL, f"output={tmp_path}", "data.document_separator=<|end of text|>"]
    study = load_study(arguments[0], arguments[1:])
    script = submission_script(StudyCommands(study, SCRIPTS), expand(study), JOB, arguments)
    (tmp_path / "submit.sh").write_text(script)
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$CALLS"\nwc -l < "$CALLS"\n')
    (tmp_path / "sbatch").chmod(0o755)
    calls = tmp_path / "calls"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    subprocess.run(["bash", str(tmp_path / "submit.sh"), "--partition=gpu"], env=environment, check=True)
    data, first, second, report = calls.read_text().splitlines()
    assert data.endswith("--prepare") and "--partition=gpu" in data and arguments[2] in data
    assert "--dependency=afterok:1 --array=1-6" in first
    assert "--dependency=afterany:2 --array=7-22" in second
    assert "--dependency=afterany:3" in report and report.endswith("--report")
    for file in (tmp_path / "submit.sh", ROOT / JOB):
        subprocess.run(["bash", "-n", str(file)], check=True)
