"""Write the report of a run: python launch/report.py [runs/tiny]

Evaluates the run's newest checkpoint with the memory on and off, writes report.md with its plots to the run's folder,
and prints it. With --recall, for a model that was trained on facts and evaluated on them: accuracy by distance, and a
story with a question, in report/report.html.
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
from infini_ds.evaluation.model_loading import load_evaluated_model
from infini_ds.evaluation.recall_report import (
    RecallReport,
    make_recall_report,
    print_recall_report,
    write_recall_report,
)
from infini_ds.evaluation.report import RunReport, evaluate_run, print_report, write_report
from infini_ds.utils.errors import UserError
from infini_ds.utils.paths import user_path

RECALL_SEGMENTS = 64  # between facts and question, in the headline and the story of a report with --recall
PROMPT_WORDS = 4  # of the report's prompt, in the command that generates text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, nargs="?", help="the run's folder (default: the newest run)")
    parser.add_argument("--rows", type=int, default=64, help="validation rows, 0 for all (default: %(default)s)")
    parser.add_argument("--recall", action="store_true", help="the report of a model of facts, such as make recall's")
    args = parser.parse_args()
    if args.rows < 0:
        raise UserError(f"--rows {args.rows} must be at least 1, or 0 for all")
    environment = detect_environment()
    set_cpu_threads(environment)
    run = args.run or newest_run()
    export = run / "export"
    if args.recall:
        model = load_evaluated_model(str(export if export.is_dir() else run), environment.device)
        recall_report = make_recall_report(run, model, RECALL_SEGMENTS)
        commands = ask_commands(recall_report)
        print_recall_report(recall_report, write_recall_report(recall_report, commands), commands)
        return
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
    return [
        *activation(),
        f"python launch/generate.py {model} --prompt {prompt}",
        f"tensorboard --logdir {runs}",
        f"{deepspeed}{ranks} launch/pretrain.py --config {run}/recipe.yaml steps={2 * report.step}",
    ]


def ask_commands(report: RecallReport) -> list[str]:
    """Return commands that ask the model: line by line, from farther away, and about facts of one's own."""
    ask = f"python launch/ask.py {shlex.quote(report.facts.path)}"
    learned = report.learned
    facts = f"{learned.keys[0]} {learned.values[0]} {learned.keys[1]} {learned.values[1]}"
    return [
        *activation(),
        ask,
        f'{ask} --facts "{facts}" --ask {learned.keys[1]}',
        f"{ask} --segments 1000 --ask {report.answers.key}",
    ]


def activation() -> list[str]:
    """Return the command that activates this environment, if it is not active, as after `make pretrain`."""
    activate = Path(sys.prefix, "bin", "activate")
    needed = "VIRTUAL_ENV" not in os.environ and activate.is_file()
    return [f"source {shlex.quote(os.path.relpath(activate))}"] if needed else []


if __name__ == "__main__":
    run_main(main)
