"""Train a grid of runs, evaluate them, and write one report.

python launch/study.py launch/studies/small.yaml [key=value ...]

Executes what is not done yet: data, runs (several at once), evaluations, and studies/NAME/report.html with results.csv.
Ctrl-C, SIGTERM and SIGUSR1 stop it with exit code 75, after training has saved: resume with the same command. Options:
    --list      list the runs, and which are done
    --prepare   prepare the data only
    --run RUN   execute one run, by its name or number, as a cluster job does
    --slurm     write a script that submits the runs as array jobs, one stage after the other, and the report
    --report    write the report of the runs that are finished
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.signals import STOPPED_EARLY
from infini_ds.study.commands import Scripts, StudyCommands
from infini_ds.study.grid import Run, expand
from infini_ds.study.local_runner import (
    ChildProcesses,
    RunFailure,
    StudyStopped,
    execute_run,
    execute_runs,
    prepare_data,
)
from infini_ds.study.report import report_study
from infini_ds.study.run_folder import check_definition
from infini_ds.study.slurm import write_submission_script
from infini_ds.study.study_config import load_study
from infini_ds.utils.errors import UserError, did_you_mean

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = Path("launch")
SCRIPTS = Scripts(LAUNCH / "pretrain.py", LAUNCH / "convert.py", LAUNCH / "evaluate.py")
SLURM_JOB = LAUNCH / "slurm" / "study.sbatch"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=os.path.expanduser, help="a study file, such as launch/studies/small.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the study file")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="list the runs")
    only.add_argument("--prepare", action="store_true", help="prepare the data only")
    only.add_argument("--run", metavar="RUN", help="execute one run, by its name or number")
    only.add_argument("--slurm", action="store_true", help="write a script that submits all runs to Slurm")
    only.add_argument("--report", action="store_true", help="write the report of the runs that are finished")
    parser.add_argument("--jobs", type=int, help="runs at once (default: one per GPU, or one per CPU core)")
    args = parser.parse_intermixed_args()
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1")
    return args


def main() -> None:
    args = parse_arguments()
    study = load_study(args.study, args.overrides, LAUNCH / "studies")
    runs, commands = expand(study), StudyCommands(study, SCRIPTS)
    for run in runs:
        check_definition(run)
    if args.list:
        list_runs(commands, runs)
    elif args.report:
        write_report(commands, runs, [])
    elif args.slurm:
        script = write_submission_script(commands, runs, SLURM_JOB, [args.study, *args.overrides])
        print(f"written: {script}\nsubmit it with: bash {script}")
    else:
        execute(args, commands, runs)


def execute(args: argparse.Namespace, commands: StudyCommands, runs: list[Run]) -> None:
    """Execute what the options ask for, and exit with 75 if stopped, 1 if a run failed, 0 otherwise."""
    children = ChildProcesses()
    children.install_signal_handlers()
    failures: list[RunFailure] = []
    try:
        if args.run:
            failure = execute_run(commands, find_run(runs, args.run), children, {}, show_output=True)
            failures = [failure] if failure else []
        else:
            prepare_data(commands, runs, children)
            if not args.prepare:
                gpus = torch.cuda.device_count()
                jobs = args.jobs or min(len(runs), gpus or len(os.sched_getaffinity(0)))
                failures = execute_runs(commands, runs, children, jobs, gpus)
    except StudyStopped:
        print("stopped: resume with the same command", file=sys.stderr)
        sys.exit(STOPPED_EARLY)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if not args.run and not args.prepare:
        write_report(commands, runs, failures)
    sys.exit(1 if failures else 0)


def find_run(runs: list[Run], wanted: str) -> Run:
    for run in runs:
        if wanted in (run.name, str(run.number)):
            return run
    hint = did_you_mean(wanted, [run.name for run in runs], cutoff=0.4)
    if not hint.startswith(": did"):
        hint = f": give a number from 1 to {len(runs)}, or a name that --list shows"
    raise UserError(f"--run {wanted} is not a run of this study{hint}")


def list_runs(commands: StudyCommands, runs: list[Run]) -> None:
    title = f"{commands.study.folder}: {len(runs)} runs"
    table = Table("", "run", "starts from", "steps", "state", title=title, title_style="b")
    for run in runs:
        state = "done" if commands.is_done(run) else "begun" if run.folder.is_dir() else ""
        table.add_row(str(run.number), run.name, run.start.name if run.start else "", f"{run.recipe.steps:,}", state)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def write_report(commands: StudyCommands, runs: list[Run], failures: list[RunFailure]) -> None:
    page = report_study(commands, runs, {failure.run: failure.explanation for failure in failures})
    print(f"report: {page}")


if __name__ == "__main__":
    os.chdir(ROOT)
    run_main(main)
