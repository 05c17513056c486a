"""Train a model from a recipe.

deepspeed launch/pretrain.py --config launch/recipes/tiny-cpu.yaml [key=value ...]

Also under `torchrun`, `srun`, or by `python` as one process. SIGTERM, SIGUSR1 and Ctrl-C stop it behind the step it is
at, saved, with exit code 75: the same command goes on.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infini_ds.training.stopping import STOPPED_EARLY, Stop

stop = Stop()
if __name__ == "__main__":
    stop.listen()  # before the imports that take seconds

from infini_ds.training.loop import train
from infini_ds.training.processes import disconnect, identify, launch, share_threads
from infini_ds.training.recipe import load_recipe
from infini_ds.training.setup import set_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a recipe, such as launch/recipes/tiny-cpu.yaml")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    args = parser.parse_intermixed_args()
    process = identify()
    recipe = load_recipe(args.config, args.overrides)
    share_threads(process)
    training = set_up(recipe, process)
    finished = train(training, stop) if training else True
    if not training and process.is_first:
        print(f"{recipe.folder} has made all of its {recipe.steps} steps: nothing to do; steps= above that goes on")
    disconnect()
    if not finished:
        sys.exit(STOPPED_EARLY)


if __name__ == "__main__":
    launch(main)
