"""A grid of runs, their evaluation, and one report: python launch/study.py launch/studies/small.yaml [key=value ...]

Makes what is not there yet: data, runs (several at once), evaluations, and studies/NAME/report.html. Told to stop
(Ctrl-C, SIGTERM, SIGUSR1) it saves and ends with exit code 75: the same command goes on. Others:
    --list      the runs, and what is done
    --prepare   the data alone
    --run RUN   one run, by its name or number: what a job of a cluster calls
    --slurm     writes a script that submits the runs as array jobs, one stage behind the other, and the report
    --report    of what is there
"""

import argparse
import difflib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

import torch
from rich.console import Console
from rich.table import Table

from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.signals import STOPPED_EARLY
from infini_ds.study.commands import check_definition, is_done
from infini_ds.study.grid import Run, Study, expand, load_study
from infini_ds.study.local_runner import Children, Failure, Stopped, make_all, make_run, prepare
from infini_ds.study.report import write_report
from infini_ds.study.slurm import write_script
from infini_ds.utils.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a grid, such as launch/studies/small.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the grid")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="show the runs")
    only.add_argument("--prepare", action="store_true", help="make the data alone")
    only.add_argument("--run", metavar="RUN", help="make one run, by its name or number")
    only.add_argument("--slurm", action="store_true", help="write the script that submits all to Slurm")
    only.add_argument("--report", action="store_true", help="write the report of what is there")
    parser.add_argument("--jobs", type=int, help="runs at once (default: one a GPU, or one a core)")
    args = parser.parse_intermixed_args()
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1")
    study = load_study(args.study, args.overrides)
    runs = expand(study)
    for run in runs:
        check_definition(run)
    if args.list:
        return show(study, runs)
    if args.report:
        return report(study, runs, [])
    if args.slurm:
        script = write_script(study, runs, [args.study, *args.overrides])
        return print(f"written: {script}\nsubmit it with: bash {script}")
    children = Children()
    children.listen()
    try:
        failures = make(args, study, runs, children)
    except Stopped:
        print("stopped: the same command goes on from there", file=sys.stderr)
        sys.exit(STOPPED_EARLY)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if not args.run and not args.prepare:
        report(study, runs, failures)
    sys.exit(1 if failures else 0)


def make(args: argparse.Namespace, study: Study, runs: list[Run], children: Children) -> list[Failure]:
    if args.run:
        failure = make_run(study, find(runs, args.run), children, {}, shown=True)
        return [failure] if failure else []
    prepare(study, runs, children)
    if args.prepare:
        return []
    jobs, gpus = places(args.jobs, len(runs))
    return make_all(study, runs, children, jobs, gpus)


def places(jobs: int | None, runs: int) -> tuple[int, int]:
    """How many runs at once, and the GPUs that they share."""
    gpus = torch.cuda.device_count()
    return jobs or min(runs, gpus or len(os.sched_getaffinity(0))), gpus


def find(runs: list[Run], asked: str) -> Run:
    for run in runs:
        if asked in (run.name, str(run.number)):
            return run
    near = difflib.get_close_matches(asked, [run.name for run in runs], n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"give a number from 1 to {len(runs)}, or a name that --list shows"
    raise UserError(f"--run {asked}: there is no such run; {hint}")


def show(study: Study, runs: list[Run]) -> None:
    table = Table("", "run", "starts from", "steps", "", title=f"{study.folder}: {len(runs)} runs", title_style="b")
    for run in runs:
        state = "done" if is_done(study, run) else "begun" if run.folder.is_dir() else ""
        table.add_row(str(run.number), run.name, run.start.name if run.start else "", f"{run.recipe.steps:,}", state)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def report(study: Study, runs: list[Run], failures: list[Failure]) -> None:
    print(f"report: {write_report(study, runs, failures)}")


if __name__ == "__main__":
    os.chdir(ROOT)
    run_main(main)
