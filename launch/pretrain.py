"""Train a model from a recipe.

deepspeed launch/pretrain.py --config launch/recipes/tiny-cpu.yaml [key=value ...]

Also under `torchrun`, `srun`, or by `python` as one process. SIGTERM, SIGUSR1 and Ctrl-C stop it behind the step it is
at, saved, with exit code 75: the same command goes on.
"""

import argparse
import sys

from infini_ds.distributed.signals import STOPPED_EARLY, GracefulShutdown

stop = GracefulShutdown()
if __name__ == "__main__":
    stop.listen()  # before the imports that take seconds

from infini_ds.config.recipe import load_recipe
from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.environment import detect_environment, set_cpu_threads, shutdown
from infini_ds.training.setup import set_up
from infini_ds.training.trainer import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a recipe, such as launch/recipes/tiny-cpu.yaml")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    args = parser.parse_intermixed_args()
    process = detect_environment()
    recipe = load_recipe(args.config, args.overrides)
    set_cpu_threads(process)
    training = set_up(recipe, process)
    finished = train(training, stop) if training else True
    if not training and process.is_first:
        print(f"{recipe.folder} has made all of its {recipe.steps} steps: nothing to do; steps= above that goes on")
    shutdown()
    if not finished:
        sys.exit(STOPPED_EARLY)


if __name__ == "__main__":
    run_main(main)
