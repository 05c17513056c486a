"""What `make pretrain` runs: text to shards, training, export, report; what is finished is left as it is.

python launch/quickstart.py [--config RECIPE] [key=value ...]
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

import torch

from infini_ds.config.recipe import load_recipe
from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.environment import free_port
from infini_ds.distributed.signal_relay import run_graceful
from infini_ds.distributed.signals import STOPPED_EARLY

DATA = "data/stdlib"
SOURCE = ["--source", "stdlib", "--sequence-length", "2048", "--vocab-size", "4096"]


def run(title: str, *command: str, held: bool = False) -> None:
    """Run one step as a command of its own; a step that fails has said why. `held`: see `run_graceful`."""
    print(f"\n=== {title}\n$ {' '.join(command)}", flush=True)
    started = time.monotonic()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu",  # else DeepSpeed warns that it found no GPU
    }
    code = (
        run_graceful(command, environment) if held else subprocess.run(command, env=environment, check=False).returncode
    )
    if code == STOPPED_EARLY:
        sys.exit(code)  # it has said so
    if code:
        print(
            f"error: this step ended with exit code {code}; mend what it says and run the same command again",
            file=sys.stderr,
        )
        sys.exit(code)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a recipe (default: by the hardware, tiny-gpu or tiny-cpu)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    args = parser.parse_intermixed_args()
    gpus = torch.cuda.device_count()
    config = args.config or f"launch/recipes/tiny-{'gpu' if gpus else 'cpu'}.yaml"
    recipe = load_recipe(config, args.overrides)

    python = sys.executable
    if recipe.data.path == DATA:  # text of one's own is prepared with options of one's own
        run("text to shards", python, "-m", "data_prep", *SOURCE, "--out", DATA)
    ranks = ["--num_gpus", str(gpus or 1), "--master_port", free_port()]
    ranks += ["--log_level", "critical"]  # ranks say themselves what is wrong
    run("training", "deepspeed", *ranks, "launch/pretrain.py", "--config", config, *args.overrides, held=True)
    export = recipe.folder / "export"
    run("export to Hugging Face format", python, "launch/convert.py", str(recipe.folder), "--out", str(export))
    run("report", python, "launch/report.py", str(recipe.folder))


if __name__ == "__main__":
    os.chdir(ROOT)
    run_main(main)
