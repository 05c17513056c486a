"""What checkpoints a run has, what is in one, and whether they are whole.

python launch/checkpoint.py list runs/tiny
python launch/checkpoint.py inspect runs/tiny/checkpoints/step-000100
python launch/checkpoint.py verify runs/tiny          all of a run, or one checkpoint; exit code 1 if one is damaged
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from infini_ds.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    complete_checkpoints,
    find_damage,
    incomplete_checkpoints,
    read_manifest,
)
from infini_ds.distributed.entry_point import run_main
from infini_ds.utils.errors import UserError

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | inspect | verify")
    commands.add_parser("list", help="the checkpoints of a run").add_argument("path", type=Path, metavar="RUN")
    commands.add_parser("inspect", help="what is in one").add_argument("path", type=Path, metavar="CHECKPOINT")
    verify = commands.add_parser("verify", help="read every file and compare its sha256")
    verify.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT")
    args = parser.parse_args()
    {"list": list_run, "inspect": inspect, "verify": verify_all}[args.command](args.path)


def find(path: Path) -> tuple[list[Path], list[Path]]:
    """The finished and the unfinished checkpoints that a path names: itself, or those of a run.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).is_file():
        return [path], []
    good, unfinished = complete_checkpoints(path), incomplete_checkpoints(path)
    if good or unfinished:
        return good, unfinished
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; give that of a run, output/name of its recipe")
    run = path.absolute().parent.parent
    if path.absolute() in incomplete_checkpoints(run):
        raise UserError(
            f"{path} is not finished (no {MANIFEST}), and no run goes on from it: give another one of {run}"
        )
    raise UserError(
        f"{path} is neither a checkpoint ({MANIFEST}) nor a run that has one (checkpoints/step-...): give the folder "
        "output/name of a recipe"
    )


def list_run(run: Path) -> None:
    table = Table("checkpoint", "tokens", "validation loss", "ranks", "MiB", "written (UTC)", "state", box=None)
    finished, unfinished = find(run)
    for checkpoint in finished:
        found = find_damage(checkpoint, read=False)
        try:
            cells = cells_of(read_manifest(checkpoint))
        except UserError:
            cells = [""] * 5
        table.add_row(checkpoint.name, *cells, f"damaged: {'; '.join(found)}" if found else "finished")
    for checkpoint in unfinished:
        table.add_row(checkpoint.name, *[""] * 5, "unfinished")
    show(table)


def cells_of(mark: CheckpointManifest) -> list[str]:
    loss = "" if mark.validation_loss is None else f"{mark.validation_loss:.4f}"
    size = sum(file.bytes for file in mark.files.values()) / MIB
    written = mark.written.partition("+")[0].replace("T", " ")
    return [f"{mark.state.tokens:,}", loss, str(mark.world_size), f"{size:,.1f}", written]


def inspect(checkpoint: Path) -> None:
    finished, unfinished = find(checkpoint)
    if finished != [checkpoint]:
        newest = (finished or unfinished)[-1]
        raise UserError(f"{checkpoint} is a run: give one of its checkpoints, such as {newest}")
    mark = read_manifest(checkpoint)
    loss = "not measured" if mark.validation_loss is None else f"{mark.validation_loss:.6f}"
    facts = {
        "checkpoint": checkpoint,
        "step": f"{mark.state.step:,}",
        "tokens seen": f"{mark.state.tokens:,}",
        "validation loss": loss,
        "written": f"{mark.written} by {mark.world_size} ranks, with torch {mark.torch}",
    }
    print("\n".join(f"{name:>15}  {value}" for name, value in facts.items()) + "\n", flush=True)
    table = Table("file", "bytes", "sha256", box=None)
    for name, file in sorted(mark.files.items()):
        table.add_row(name, f"{file.bytes:,}", file.sha256)
    show(table)


def verify_all(path: Path) -> None:
    damaged = 0
    finished, unfinished = find(path)
    for checkpoint in finished:
        found = find_damage(checkpoint)
        damaged += bool(found)
        print(f"{checkpoint}: {'; '.join(found) or 'whole'}", flush=True)
    for checkpoint in unfinished:
        print(f"{checkpoint}: unfinished, no run goes on from it", flush=True)
    sys.exit(1 if damaged else 0)


def show(table: Table) -> None:
    """As wide as the terminal; in a log file or a pipe nothing is wrapped."""
    Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False).print(table)


if __name__ == "__main__":
    run_main(main)
