"""Write the script that submits a study to Slurm: data preparation, an array job for each stage, then the report."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from infini_ds.study.commands import StudyCommands
from infini_ds.study.grid import Run
from infini_ds.utils.atomic import write_text_atomic


def submission_script(commands: StudyCommands, runs: list[Run], job_script: Path, arguments: Sequence[str]) -> str:
    """Return the text of the script, which submits only runs that are not done.

    Args:
        job_script: what each job runs.
        arguments: the study file and its overrides, as on the command line.
    """
    study = commands.study
    job = f"{shlex.quote(str(job_script))} {shlex.join(arguments)}"
    sbatch = f'sbatch --parsable --job-name={shlex.quote(study.name)} "$@"'
    lines = [
        "#!/usr/bin/env bash",
        f"# Submits the runs of {study.folder} that are not done. Start it from the project's root, with options of",
        "# sbatch:",
        f"#   bash {study.folder / 'submit.sh'} --partition=gpu --account=NAME",
        "set -euo pipefail",
        f"previous=$({sbatch} --gres=none {job} --prepare)",
        'dependency="afterok:$previous"  # training needs the data; a run that fails does not stop the later stages',
    ]
    for stage in range(1 + max(run.stage for run in runs)):
        numbers = [run.number for run in runs if run.stage == stage and not commands.is_done(run)]
        if numbers:
            lines.append(f'previous=$({sbatch} --dependency="$dependency" --array={format_ranges(numbers)} {job})')
            lines.append('dependency="afterany:$previous"')
    lines.append(f'{sbatch} --gres=none --dependency="$dependency" {job} --report')
    return "\n".join(lines) + "\n"


def format_ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> "1-3,7", the form of sbatch --array."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def write_submission_script(
    commands: StudyCommands, runs: list[Run], job_script: Path, arguments: Sequence[str]
) -> Path:
    folder = commands.study.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "submit.sh"
    write_text_atomic(path, submission_script(commands, runs, job_script, arguments))
    return path
