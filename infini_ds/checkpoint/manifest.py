"""The mark of a checkpoint, `checkpoint.json`: where the run stood, and the size and sha256 of every other file.

It is written last and removed first, so a folder without one is half written or half removed.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from infini_ds.utils.errors import UserError

MANIFEST = "checkpoint.json"
CHUNK = 1 << 22  # bytes read at a time


@dataclass
class TrainState:
    """Where the run stands."""

    step: int = 0
    tokens: int = 0
    validated: int = -1  # the step of the last validation
    validation_loss: float | None = None  # at that step
    consecutive_skips: int = 0  # steps up to this one without a finite loss or gradient
    losses: int = 0  # that the next two are taken over
    loss_mean: float = 0.0  # of recent steps
    loss_variance: float = 0.0


@dataclass(frozen=True)
class FileDigest:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    state: TrainState
    world_size: int
    written: str  # UTC
    torch: str  # version
    files: dict[str, FileDigest]

    @property
    def validation_loss(self) -> float | None:
        """Of this very step, if it was measured."""
        return self.state.validation_loss if self.state.validated == self.state.step else None


def fsync_and_hash(file: Path) -> FileDigest:
    """Force a file that was just written to the disk, and sum it up."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    return FileDigest(file.stat().st_size, sha256_of(file))


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_dir(folder: Path) -> None:
    """Force the names in a folder to the disk: fsync of a file does not do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(checkpoint: Path, mark: CheckpointManifest) -> None:
    """Make the checkpoint good, once all of its files are on the disk."""
    body = asdict(mark)
    partial = checkpoint / (MANIFEST + ".partial")
    with partial.open("w") as opened:
        json.dump(body | {"sha256": _sum_of(body)}, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())
    fsync_dir(checkpoint)
    os.replace(partial, checkpoint / MANIFEST)
    fsync_dir(checkpoint)
    fsync_dir(checkpoint.parent)


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """
    Raises:
        UserError: the mark is missing, or not what was written.
    """
    try:
        body = json.loads((checkpoint / MANIFEST).read_text())
        if body.pop("sha256") != _sum_of(body):
            raise ValueError("the checksum does not match")
        state = body["state"]
        if "skipped_in_a_row" in state:  # the field's name in checkpoints written before version 0.2
            state["consecutive_skips"] = state.pop("skipped_in_a_row")
        body["state"] = TrainState(**state)
        body["files"] = {name: FileDigest(**file) for name, file in body["files"].items()}
        return CheckpointManifest(**body)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{checkpoint / MANIFEST} is not as it was written ({error})") from error


def _sum_of(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def find_damage(checkpoint: Path, rank: int = 0, world_size: int = 1, read: bool = True) -> list[str]:
    """A sentence for each file that is not as it was written; none for a whole checkpoint.

    Args:
        rank, world_size: look at every `world_size`-th file only, for ranks that share the work.
        read: whether contents are read, or only sizes compared.
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
                found.append(f"{file} has {size:,} bytes and was written with {written.bytes:,}")
            elif read and sha256_of(file) != written.sha256:
                found.append(f"{file} has another content than was written (sha256)")
        except FileNotFoundError:
            found.append(f"{file} is missing")
        except OSError as error:
            found.append(f"{file} cannot be read ({error})")
    return found


def _folders(run: Path) -> list[Path]:
    found = [folder for folder in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def complete_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first; whether their files are whole is for `damage` to say."""
    return [folder for folder in _folders(run) if (folder / MANIFEST).exists()]


def incomplete_checkpoints(run: Path) -> list[Path]:
    """What is being written, or was when the run was killed."""
    return [folder for folder in _folders(run) if not (folder / MANIFEST).exists()]
