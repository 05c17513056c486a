"""Evaluate a model: one command, one evaluation.json, one table and one plot for each task.

python launch/evaluate.py                                        the newest run
python launch/evaluate.py runs/tiny                              a run, one of its checkpoints, or an exported folder
python launch/evaluate.py gpt2 --tasks blimp --blimp BLIMP/data  any causal model of Hugging Face, as a baseline
torchrun --nproc-per-node 8 launch/evaluate.py runs/tiny         split across ranks; deepspeed and srun work as well

Finished parts are cached in the folder of the results and not computed again.
"""

import argparse
import os
import shlex
import sys

from rich.console import Console

from infini_ds.conversion.locate import newest_run
from infini_ds.distributed import collectives
from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.environment import detect_environment, set_cpu_threads, shutdown
from infini_ds.evaluation.evaluate import evaluate, show_evaluation
from infini_ds.evaluation.model_loading import load_evaluated_model
from infini_ds.evaluation.result_cache import ResultCache
from infini_ds.evaluation.task import TASKS, EvaluationContext, add_integer
from infini_ds.utils.errors import UserError, did_you_mean
from infini_ds.utils.paths import user_path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = "an export, a run, a checkpoint, or the folder or hub name of a causal model (default: the newest run)"
    add("model", nargs="?", type=os.path.expanduser, help=what)
    add("--tasks", nargs="+", default=["position"], metavar="TASK", help=f"{', '.join(TASKS)} (default: position)")
    add("--out", type=user_path, help="folder of the results (default: evaluation/ in the folder of the model)")
    add_integer(parser, "--seed", 0, 0, "of random draws in all tasks")
    add_integer(parser, "--limit", 0, 0, "examples of each data set, 0 for all", shown="all")
    add_integer(parser, "--batch-tokens", 1, 16_384, "tokens to compute at once; no result depends on it")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    for task in TASKS.values():
        task.add_arguments(parser.add_argument_group(f"task {task.name}", task.help))
    args = parser.parse_args()
    for name in args.tasks:
        if name not in TASKS:
            raise UserError(f"--tasks {name} is not a task{did_you_mean(name, TASKS)}")
    args.tasks = list(dict.fromkeys(args.tasks))
    return args


def main() -> None:
    args = parse_arguments()
    environment = detect_environment()
    set_cpu_threads(environment)
    collectives.init_gloo(environment)
    name = args.model or str(collectives.broadcast_from_rank_zero(newest_run))
    model = load_evaluated_model(name, environment.device)
    folder = args.out or model.results_folder
    context = EvaluationContext(
        cache=ResultCache(folder, model.cache_key),
        arguments=args,
        seed=args.seed,
        limit=args.limit or None,
        batch_tokens=args.batch_tokens,
    )
    typed = [word for word in sys.argv if not word.startswith("--local_rank=")]  # which the deepspeed launcher gives
    evaluation = evaluate(model, args.tasks, context, folder, shlex.join(["python", *typed]))
    if environment.is_rank_zero:
        show_evaluation(evaluation, args.tasks, Console(width=None if sys.stdout.isatty() else 120))
        print(f"Written to {folder}")
    shutdown()


if __name__ == "__main__":
    run_main(main)
