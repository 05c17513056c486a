"""The report of a run: python launch/report.py runs/tiny

Evaluates the run's export with the memory and without, writes report.md and its plots, and prints the short of it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infini_ds.evaluation import report
from infini_ds.training.processes import identify, launch, share_threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--model", type=Path, help="an export or checkpoint to evaluate (default: RUN/export)")
    parser.add_argument("--rows", type=int, default=64, help="validation rows, 0 for all (default: %(default)s)")
    args = parser.parse_args()
    share_threads(identify())
    measured = report.measure(args.run, args.model or args.run / "export", args.rows)
    report.show(measured, report.write(measured))


if __name__ == "__main__":
    launch(main)
