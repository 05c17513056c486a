"""Train a model from a recipe.

deepspeed launch/pretrain.py [--config launch/recipes/tiny-cpu.yaml] [key=value ...]

Without --config and a batch (batch.rows or batch.tokens) it takes the recipe that fits the hardware, tiny-gpu or
tiny-cpu. Data that the project can prepare by itself, as those of the recipes tiny-* and recall, are prepared if they
are not there.

Also under `torchrun`, `srun`, or with `python` as one process. SIGTERM, SIGUSR1 and Ctrl-C stop it after the current
step, with a checkpoint and exit code 75: resume with the same command.
"""

import argparse
import sys
from contextlib import nullcontext

from infini_ds.distributed.signals import STOPPED_EARLY, GracefulShutdown

shutdown = GracefulShutdown()
if __name__ == "__main__":
    shutdown.listen()  # before the imports that take seconds

from infini_ds.config.default_recipe import load_recipe_or_default, prepare_default_data
from infini_ds.config.resolve import resolve
from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.environment import detect_environment, set_cpu_threads
from infini_ds.distributed.process_group import connect
from infini_ds.utils.logging import log_to_file
from infini_ds.utils.run_lock import acquire_run_lock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a recipe, such as launch/recipes/tiny-cpu.yaml (default: see above)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    args = parser.parse_intermixed_args()
    environment = detect_environment()
    recipe = load_recipe_or_default(args.config, args.overrides)
    prepare_default_data(recipe, environment)
    set_cpu_threads(environment)
    run = resolve(recipe, environment)

    from infini_ds.training.setup import build_trainer  # imports DeepSpeed, which takes seconds

    lock = acquire_run_lock(recipe.folder) if environment.is_rank_zero else nullcontext()
    with lock, connect(environment, recipe.timeout_minutes), log_to_file(recipe.folder / "train.log"):
        trainer = build_trainer(run, shutdown)
        finished = trainer is None or trainer.fit()
    if not finished:
        sys.exit(STOPPED_EARLY)


if __name__ == "__main__":
    run_main(main)
