"""Run what `make pretrain` runs: text to shards, training, export, report. Finished steps are skipped.

python launch/quickstart.py [--config RECIPE] [key=value ...]
python launch/quickstart.py --recall [key=value ...]    what `make recall` runs: a model of facts, evaluated and asked
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from infini_ds.config.default_recipe import default_data, default_recipe
from infini_ds.config.recipe import Recipe, load_recipe
from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.environment import free_port
from infini_ds.distributed.signal_relay import run_graceful
from infini_ds.distributed.signals import STOPPED_EARLY
from infini_ds.evaluation.recall_story import SOURCE, learned_facts
from infini_ds.evaluation.task import add_integer

ROOT = Path(__file__).resolve().parents[1]
MEMORY_OF_RANK = 2**30  # bytes that a rank of tiny-cpu takes, rounded up
# What the model of the default's data, Python, is asked to continue.
PROMPTS = ("import ", "def ", "class ")
SAMPLING = ("--temperature", "0.6", "--max-new-tokens", "100")
RECALL_CONFIG = "launch/recipes/recall.yaml"
RECALL_SEGMENTS = ("1", "4", "16", "64", "256")  # between facts and question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a recipe (default: tiny-gpu on a machine with a GPU, else tiny-cpu)")
    parser.add_argument("--recall", action="store_true", help="train a model to recall facts, evaluate it, and ask it")
    add_integer(parser, "--examples", 2, 200, "questions at each distance, with --recall")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    args = parser.parse_intermixed_args()
    os.chdir(ROOT)
    config = args.config or (RECALL_CONFIG if args.recall else str(default_recipe()))
    recipe = load_recipe(config, args.overrides)
    export = recipe.folder / "export"

    data = default_data(recipe)
    for folder in data:  # other data is prepared by the user, with options of their own
        run_step("text to shards", folder.prepare)
    run_step("training", [*launcher(recipe), "launch/pretrain.py", "--config", config, *args.overrides], graceful=True)
    run_step("export to Hugging Face format", ["launch/convert.py", str(recipe.folder), "--out", str(export)])
    if args.recall or any(folder.source.startswith(SOURCE) for folder in data):
        task = ["--tasks", "recall", "--recall", learned_facts(recipe.folder).task, "--segments", *RECALL_SEGMENTS]
        where = [str(export), "--out", str(recipe.folder / "evaluation"), "--examples", str(args.examples)]
        run_step("accuracy by distance", [*launcher(recipe), "launch/evaluate.py", *where, *task])
        run_step("report", ["launch/report.py", "--recall", str(recipe.folder)])
        return
    run_step("report", ["launch/report.py", str(recipe.folder)])
    if data:
        prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
        run_step("text", ["launch/generate.py", str(export), *SAMPLING, *prompts])


def launcher(recipe: Recipe) -> list[str]:
    """Return the arguments of Python that start a script as several ranks."""
    # Not by the `deepspeed` command, whose first line breaks if the environment's path has a space. Its own log is
    # hidden, since the ranks print what is wrong.
    options = ["--num_gpus", str(ranks(recipe)), "--master_port", free_port(), "--log_level", "critical"]
    return ["-m", "deepspeed.launcher.runner", *options]


def ranks(recipe: Recipe) -> int:
    """Return how many ranks train: one a GPU; on the CPU as many as have a core each, enough memory, and equal rows."""
    gpus = torch.cuda.device_count()
    if gpus or recipe.batch.rows is None:
        return gpus or 1
    rows = recipe.batch.rows
    most = min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // MEMORY_OF_RANK, rows)
    return max((number for number in range(1, most + 1) if rows % number == 0), default=1)


def run_step(title: str, arguments: list[str], graceful: bool = False) -> None:
    """Run Python with `arguments`. If it fails, exit with its code; it has printed why.

    Args:
        graceful: relay signals to the ranks that it launches, so that they save.
    """
    command = [sys.executable, *arguments]
    print(f"\n=== {title}\n$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # for ninja, which compiles DeepSpeed's kernels
        "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu",  # else DeepSpeed warns that it found no GPU
    }
    code = run_graceful(command, environment) if graceful else subprocess.run(command, env=environment).returncode
    if code == STOPPED_EARLY:  # the run has printed how to resume
        sys.exit(code)
    if code:
        print(
            f"error: this step ended with exit code {code}: fix what it reports above, and run the same command again",
            file=sys.stderr,
        )
        sys.exit(code)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    run_main(main)
