"""The script that submits a study to Slurm: the data, then an array job for each stage, then the report."""

import shlex
from pathlib import Path

from infini_ds.study.commands import is_done
from infini_ds.study.grid import Run, Study

JOB = "launch/slurm/study.sbatch"


def submission(study: Study, runs: list[Run], call: list[str]) -> str:
    """The script's text; `call`: what names the study on the command line, a grid and its overrides."""
    words = shlex.join(call)
    submit = f'sbatch --parsable --job-name={shlex.quote(study.name)} "$@"'
    lines = [
        "#!/usr/bin/env bash",
        f"# Submits what is left to do of {study.folder}. From the root of the project, with options for sbatch:",
        f"#   bash {study.folder / 'submit.sh'} --partition=gpu --account=NAME",
        "set -euo pipefail",
        f"before=$({submit} --gres=none {JOB} {words} --prepare)",
        'needed="afterok:$before"  # without data there is nothing to train on; a run that fails leaves others alone',
    ]
    for stage in range(1 + max(run.stage for run in runs)):
        left = [run.number for run in runs if run.stage == stage and not is_done(study, run)]
        if left:
            lines.append(f'before=$({submit} --dependency="$needed" --array={ranges(left)} {JOB} {words})')
            lines.append('needed="afterany:$before"')
    lines.append(f'{submit} --gres=none --dependency="$needed" {JOB} {words} --report')
    return "\n".join(lines) + "\n"


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3,7", as --array takes them."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def write_script(study: Study, runs: list[Run], call: list[str]) -> Path:
    study.folder.mkdir(parents=True, exist_ok=True)
    script = study.folder / "submit.sh"
    script.write_text(submission(study, runs, call))
    return script
