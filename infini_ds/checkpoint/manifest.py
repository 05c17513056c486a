"""The checkpoint manifest, `checkpoint.json`: the state of the run, and the size and SHA-256 of every other file.

It is written last and removed first, so a folder without a manifest is incomplete: half written or half removed.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infini_ds.utils.atomic import fsync_dir, write_json_atomic
from infini_ds.utils.errors import UserError
from infini_ds.utils.hashing import sha256_of_file, sha256_of_json

MANIFEST = "checkpoint.json"


@dataclass
class TrainState:
    """The state of a run apart from model, optimizer and data.

    Attributes:
        step: optimizer steps that were run, skipped ones among them.
        tokens: tokens of their rows.
        validated: step of the last validation; -1 before the first.
        validation_loss: its loss.
        consecutive_skips: steps up to this one that were skipped for a non-finite loss or gradient.
        losses: number of losses that the next two are taken over.
        loss_mean: mean of recent losses.
        loss_variance: variance of recent losses.
        stage: number of the stage of the curriculum that the next step belongs to, from 0.
        stage_start: step after which it began.
        recall: accuracy that the end of the stage depends on, at the last validation; None if none was measured.
    """

    step: int = 0
    tokens: int = 0
    validated: int = -1
    validation_loss: float | None = None
    consecutive_skips: int = 0
    losses: int = 0
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    stage: int = 0
    stage_start: int = 0
    recall: float | None = None


@dataclass(frozen=True)
class FileDigest:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint holds.

    Attributes:
        state: the state of the run.
        world_size: number of ranks that wrote it; each wrote a shard of the optimizer.
        written: time in UTC, in ISO 8601.
        torch: version of torch.
        files: size and checksum by file name.
        sequence: number of ranks of a sequence group. 1 in checkpoints that were written before it was recorded.
    """

    state: TrainState
    world_size: int
    written: str
    torch: str
    files: dict[str, FileDigest]
    sequence: int = 1

    @property
    def validation_loss(self) -> float | None:
        """The validation loss at the checkpoint's own step. None if there was no validation at that step."""
        return self.state.validation_loss if self.state.validated == self.state.step else None


def fsync_and_hash(file: Path) -> FileDigest:
    """fsync a file and return its size and SHA-256."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    return FileDigest(file.stat().st_size, sha256_of_file(file))


def write_manifest(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest, which makes a checkpoint complete. All of its files have to be on the disk already."""
    body = asdict(manifest)
    fsync_dir(checkpoint)
    write_json_atomic(checkpoint / MANIFEST, body | {"sha256": sha256_of_json(body)})
    fsync_dir(checkpoint.parent)


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """Read a checkpoint's manifest, also of an earlier version.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        body: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
        if body.pop("sha256") != sha256_of_json(body):
            raise ValueError("its checksum does not match")
        state = body["state"]
        if "skipped_in_a_row" in state:  # the field's name in checkpoints written before version 0.2
            state["consecutive_skips"] = state.pop("skipped_in_a_row")
        body["state"] = TrainState(**state)
        body["files"] = {name: FileDigest(**file) for name, file in body["files"].items()}
        return CheckpointManifest(**body)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{checkpoint / MANIFEST} is damaged ({error})") from error


def find_damage(checkpoint: Path, rank: int = 0, world_size: int = 1, read: bool = True) -> list[str]:
    """Return a sentence for each file that differs from what was written; an empty list for an intact checkpoint.

    Args:
        rank, world_size: check every `world_size`-th file only, from number `rank` on, to split the work across ranks.
        read: whether to read and hash contents, or to compare sizes only.
    """
    try:
        files = read_manifest(checkpoint).files
    except UserError as error:
        return [str(error)]
    found = []
    for name in sorted(files)[rank::world_size]:
        file, written = checkpoint / name, files[name]
        try:
            size = file.stat().st_size
            if size != written.bytes:
                found.append(f"{file} has {size:,} bytes instead of {written.bytes:,}")
            elif read and sha256_of_file(file) != written.sha256:
                found.append(f"{file} does not match its checksum (SHA-256)")
        except FileNotFoundError:
            found.append(f"{file} is missing")
        except OSError as error:
            found.append(f"{file} cannot be read ({error})")
    return found


def complete_checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints that have a manifest, oldest first. Their files may be damaged: see `find_damage`."""
    return [folder for folder in _checkpoint_folders(run) if (folder / MANIFEST).exists()]


def incomplete_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints that are being written, or that a killed run left half written, oldest first."""
    return [folder for folder in _checkpoint_folders(run) if not (folder / MANIFEST).exists()]


def _checkpoint_folders(run: Path) -> list[Path]:
    found = [folder for folder in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))
