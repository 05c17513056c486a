"""What is wrong on this node before a run finds out.

python launch/doctor.py [--config launch/recipes/tiny-cpu.yaml] [key=value ...] [--fix] [--ranks N]

Without --config and a batch (batch.rows or batch.tokens) it checks this machine for the recipe that fits its hardware.
Under `deepspeed`, `torchrun` or `srun`, as the run itself would be started, it also tries whether the ranks reach each
other. Exit code 1 if there is a problem; warnings are no problem.
"""

import argparse
import os
import socket
import subprocess
import sys

from rich.console import Console
from rich.text import Text

from infini_ds.config.default_recipe import (
    lacks_default_data,
    load_recipe_or_default,
    needs_default,
    with_data_to_prepare,
)
from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.environment import DistEnv, detect_environment, shutdown
from infini_ds.distributed.rendezvous_check import check_rendezvous
from infini_ds.planning.doctor import Finding, examine
from infini_ds.utils.errors import UserError

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def show(finding: Finding, console: Console) -> None:
    line = Text.assemble((f"{finding.state:8}", STYLES[finding.state]), f"{finding.check:14}", finding.sentence)
    console.print(line, soft_wrap=True)


def meet_as_rank(process: DistEnv, seconds: float) -> Finding:
    try:
        return Finding("ranks", "ok", check_rendezvous(process, seconds))
    except UserError as error:
        return Finding("ranks", "problem", str(error))
    finally:
        shutdown()


def meet_here(ranks: int, seconds: float) -> Finding:
    """Start this script as that many ranks of this node; the first one tells what was found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, "--only-ranks", "--seconds", str(seconds)]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | places | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate()[0].strip() for process in started]
    state, _, sentence = said[0].partition(" ")
    return Finding(
        "ranks", state or "problem", sentence.partition("ranks")[2].strip() or "the first one died at its start"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a recipe, such as launch/recipes/tiny-cpu.yaml")
    parser.add_argument("--fix", action="store_true", help="mend what is safe: remove what dead runs left, and damaged "
                        "shards that can be made anew")  # fmt: skip
    parser.add_argument("--ranks", type=int, default=1, help="try as many ranks on this node (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="to wait for other ranks (default: %(default)s)")
    parser.add_argument("--only-ranks", action="store_true", help="leave out all but that")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    args = parser.parse_intermixed_args()
    if args.ranks < 1 or not args.seconds > 0:
        raise UserError(f"--ranks {args.ranks} --seconds {args.seconds}: give 1 or more, and a time above 0")
    process = detect_environment()
    recipe = None if args.only_ranks else load_recipe_or_default(args.config, args.overrides)
    console = Console(highlight=False)
    problems = 0
    if process.local_rank == 0 and recipe:
        prepares = needs_default(args.config, args.overrides) and lacks_default_data(recipe)
        if prepares:
            recipe = with_data_to_prepare(recipe)
        for finding in examine(recipe, process, args.fix, require_data=not prepares):
            problems += finding.state == "problem"
            show(finding, console)
    if process.world_size > 1 or args.ranks > 1:
        here = args.ranks > 1 and process.world_size == 1
        finding = meet_here(args.ranks, args.seconds) if here else meet_as_rank(process, args.seconds)
        problems += finding.state == "problem"
        if process.is_first or finding.state == "problem":
            show(finding, console)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run_main(main)
