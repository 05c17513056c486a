"""Find what is wrong on this node before a run does.

python launch/doctor.py [--config launch/recipes/tiny-cpu.yaml] [key=value ...] [--fix] [--ranks N]

Without --config and a batch (batch.rows or batch.tokens) it checks this machine for the recipe that fits its hardware.
Under `deepspeed`, `torchrun` or `srun`, started as the run itself, it also checks the rendezvous of the ranks. Exits
with 1 if there is a problem; a warning is not one.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace

from rich.console import Console
from rich.text import Text

from infini_ds.config.default_recipe import (
    data_to_prepare,
    load_recipe_or_default,
    with_data_to_prepare,
)
from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.environment import DistEnv, detect_environment, free_port, shutdown
from infini_ds.distributed.rendezvous_check import check_rendezvous
from infini_ds.planning.doctor import Finding, check_node
from infini_ds.utils.errors import UserError

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a recipe, such as launch/recipes/tiny-cpu.yaml")
    parser.add_argument("--fix", action="store_true", help="repair what is safe: remove what dead runs left, and "
                        "damaged shards that can be restored")  # fmt: skip
    parser.add_argument(
        "--ranks", type=int, default=1, help="check for, and try, as many ranks here (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="to wait for other ranks (default: %(default)s)")
    parser.add_argument("--only-ranks", action="store_true", help="check nothing but the ranks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    args = parser.parse_intermixed_args()
    if args.ranks < 1 or not args.seconds > 0:
        raise UserError(f"--ranks {args.ranks} --seconds {args.seconds}: give 1 or more, and a time above 0")
    environment = detect_environment()
    recipe = None if args.only_ranks else load_recipe_or_default(args.config, args.overrides)
    console = Console(highlight=False)
    problems = 0
    if recipe and environment.local_rank == 0:
        prepares = bool(data_to_prepare(recipe))
        if prepares:
            recipe = with_data_to_prepare(recipe)
        alone = environment.world_size == 1
        ranks = replace(environment, world_size=args.ranks, local_world_size=args.ranks) if alone else environment
        for finding in check_node(recipe, ranks, args.fix, require_data=not prepares):
            problems += finding.state == "problem"
            show(finding, console)
    if environment.world_size > 1 or args.ranks > 1:
        if environment.world_size > 1:
            finding = check_ranks(environment, args.seconds)
        else:
            finding = check_local_ranks(args.ranks, args.seconds)
        problems += finding.state == "problem"
        if environment.is_rank_zero or finding.state == "problem":
            show(finding, console)
    sys.exit(1 if problems else 0)


def show(finding: Finding, console: Console) -> None:
    line = Text.assemble((f"{finding.state:8}", STYLES[finding.state]), f"{finding.check:14}", finding.sentence)
    console.print(line, soft_wrap=True)


def check_ranks(environment: DistEnv, seconds: float) -> Finding:
    """Check the rendezvous as one of its ranks."""
    try:
        return Finding("ranks", "ok", check_rendezvous(environment, seconds))
    except UserError as error:
        return Finding("ranks", "problem", str(error))
    finally:
        shutdown()


def check_local_ranks(ranks: int, seconds: float) -> Finding:
    """Start this script as several ranks on this node, and return what the first one prints."""
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--only-ranks", "--seconds", str(seconds)],
            env=os.environ | world | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in started]
    state, _, rest = outputs[0].strip().partition(" ")
    sentence = rest.partition("ranks")[2].strip()
    if state != "ok" or not sentence:
        return Finding("ranks", "problem", sentence or "the first rank died at its start")
    return Finding("ranks", "ok", sentence)


if __name__ == "__main__":
    run_main(main)
