"""List a run's checkpoints, show what one holds, and verify that their files are intact.

python launch/checkpoint.py list runs/tiny
python launch/checkpoint.py inspect runs/tiny/checkpoints/step-000100
python launch/checkpoint.py verify runs/tiny          of a run or a checkpoint; exit code 1 if one is damaged
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
from infini_ds.utils.paths import user_path

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | inspect | verify")
    commands.add_parser("list", help="list the checkpoints of a run").add_argument(
        "path", type=user_path, metavar="RUN"
    )
    commands.add_parser("inspect", help="show what one holds").add_argument(
        "path", type=user_path, metavar="CHECKPOINT"
    )
    verify = commands.add_parser("verify", help="read every file and compare its SHA-256")
    verify.add_argument("path", type=user_path, metavar="RUN_OR_CHECKPOINT")
    args = parser.parse_args()
    {"list": list_checkpoints, "inspect": inspect_checkpoint, "verify": verify_checkpoints}[args.command](args.path)


def find_checkpoints(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the complete and the incomplete checkpoints that a path names: itself, or those of a run.

    Raises:
        UserError: it names none.
    """
    if (path / MANIFEST).is_file():
        return [path], []
    complete, incomplete = complete_checkpoints(path), incomplete_checkpoints(path)
    if complete or incomplete:
        return complete, incomplete
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a run, output/name of its recipe")
    run = path.absolute().parent.parent
    if path.absolute() in incomplete_checkpoints(run):
        raise UserError(f"{path} is incomplete (no {MANIFEST}), and no run resumes from it: give another one of {run}")
    raise UserError(
        f"{path} is neither a checkpoint ({MANIFEST}) nor a run that has one (checkpoints/step-...): give the folder "
        "output/name of a recipe"
    )


def list_checkpoints(run: Path) -> None:
    table = Table("checkpoint", "tokens", "validation loss", "ranks", "MiB", "written (UTC)", "state", box=None)
    complete, incomplete = find_checkpoints(run)
    for checkpoint in complete:
        damage = find_damage(checkpoint, read=False)
        try:
            cells = describe(read_manifest(checkpoint))
        except UserError:
            cells = [""] * 5
        table.add_row(checkpoint.name, *cells, f"damaged: {'; '.join(damage)}" if damage else "complete")
    for checkpoint in incomplete:
        table.add_row(checkpoint.name, *[""] * 5, "incomplete")
    print_table(table)


def describe(manifest: CheckpointManifest) -> list[str]:
    """Return the cells of a checkpoint's row: tokens, validation loss, ranks, size, time."""
    loss = "" if manifest.validation_loss is None else f"{manifest.validation_loss:.4f}"
    size = sum(file.bytes for file in manifest.files.values()) / MIB
    written = manifest.written.partition("+")[0].replace("T", " ")
    return [f"{manifest.state.tokens:,}", loss, str(manifest.world_size), f"{size:,.1f}", written]


def inspect_checkpoint(checkpoint: Path) -> None:
    complete, incomplete = find_checkpoints(checkpoint)
    if complete != [checkpoint]:
        newest = (complete or incomplete)[-1]
        raise UserError(f"{checkpoint} is a run: give one of its checkpoints, such as {newest}")
    manifest = read_manifest(checkpoint)
    data_size = manifest.world_size // manifest.sequence
    facts = {
        "checkpoint": str(checkpoint),
        "step": f"{manifest.state.step:,}",
        "tokens seen": f"{manifest.state.tokens:,}",
        "validation loss": "not measured" if manifest.validation_loss is None else f"{manifest.validation_loss:.6f}",
        "written": f"{manifest.written} with torch {manifest.torch}",
        "written by": f"{manifest.world_size} ranks, {data_size} data x {manifest.sequence} sequence",
    }
    print("\n".join(f"{name:>15}  {value}" for name, value in facts.items()) + "\n", flush=True)
    table = Table("file", "bytes", "sha256", box=None)
    for name, file in sorted(manifest.files.items()):
        table.add_row(name, f"{file.bytes:,}", file.sha256)
    print_table(table)


def verify_checkpoints(path: Path) -> None:
    damaged = 0
    complete, incomplete = find_checkpoints(path)
    for checkpoint in complete:
        damage = find_damage(checkpoint)
        damaged += bool(damage)
        print(f"{checkpoint}: {'; '.join(damage) or 'intact'}", flush=True)
    for checkpoint in incomplete:
        print(f"{checkpoint}: incomplete, no run resumes from it", flush=True)
    sys.exit(1 if damaged else 0)


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal; in a log file or a pipe no line is wrapped."""
    Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False).print(table)


if __name__ == "__main__":
    run_main(main)
