"""Write the report of a run: python launch/report.py [runs/tiny]

Evaluates the run's newest checkpoint with the memory on and off, writes report.md with its plots to the run's folder,
and prints it.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch

from infini_ds.conversion.locate import newest_run
from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.environment import detect_environment, set_cpu_threads
from infini_ds.evaluation.report import RunReport, evaluate_run, print_report, write_report
from infini_ds.utils.errors import UserError
from infini_ds.utils.paths import user_path

PROMPT_WORDS = 4  # of the report's prompt, in the command that generates text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, nargs="?", help="the run's folder (default: the newest run)")
    parser.add_argument("--rows", type=int, default=64, help="validation rows, 0 for all (default: %(default)s)")
    args = parser.parse_args()
    if args.rows < 0:
        raise UserError(f"--rows {args.rows} must be at least 1, or 0 for all")
    set_cpu_threads(detect_environment())
    run = args.run or newest_run()
    export = run / "export"
    report = evaluate_run(run, export if export.is_dir() else run, args.rows or None)
    commands = next_commands(report)
    print_report(report, write_report(report, commands), commands)


def next_commands(report: RunReport) -> list[str]:
    """Return commands that use the run: generate text, look at its metrics, train it for longer."""
    model, run, runs = (shlex.quote(str(path)) for path in (report.model, report.run, report.run.parent))
    prompt = shlex.quote(" ".join(report.prompt.split()[:PROMPT_WORDS]))
    # By itself the deepspeed command starts a rank for each GPU; on the CPU one, whatever started the run.
    ranks = "" if torch.cuda.is_available() or report.ranks == 1 else f" --num_gpus {report.ranks}"
    # The first line of DeepSpeed's own script breaks at a space in the environment's path.
    deepspeed = "deepspeed" if " " not in sys.prefix else "python -m deepspeed.launcher.runner"
    activate = Path(sys.prefix, "bin", "activate")
    needs_activation = "VIRTUAL_ENV" not in os.environ and activate.is_file()  # as after `make pretrain`
    return [
        *([f"source {shlex.quote(os.path.relpath(activate))}"] if needs_activation else []),
        f"python launch/generate.py {model} --prompt {prompt}",
        f"tensorboard --logdir {runs}",
        f"{deepspeed}{ranks} launch/pretrain.py --config {run}/recipe.yaml steps={2 * report.step}",
    ]


if __name__ == "__main__":
    run_main(main)
