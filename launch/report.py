"""The report of a run: python launch/report.py runs/tiny

Evaluates the run's newest checkpoint with the memory and without, writes report.md and its plots, and prints it.
"""

import argparse
from pathlib import Path

from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.environment import detect_environment, set_cpu_threads
from infini_ds.evaluation import report
from infini_ds.utils.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--rows", type=int, default=64, help="validation rows, 0 for all (default: %(default)s)")
    args = parser.parse_args()
    if args.rows < 0:
        raise UserError(f"--rows {args.rows} must be at least 1, or 0 for all")
    set_cpu_threads(detect_environment())
    export = args.run / "export"
    measured = report.measure(args.run, export if export.is_dir() else args.run, args.rows or None)
    report.show(measured, report.write(measured))


if __name__ == "__main__":
    run_main(main)
