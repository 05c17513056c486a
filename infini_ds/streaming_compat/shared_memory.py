"""What streaming keeps in shared memory and beside it: whose it is, whether its run lives, and its removal.

streaming names its segments by a number, `/dev/shm/000003_locals` and others, and its file locks alike. A run that is
killed as a whole leaves them. They take numbers and room, and keep the cache of remote shards from being opened again.
"""

import fcntl
import os
import pwd
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from infini_ds.streaming_compat.library import FILE_LOCKS, SEGMENTS, SHM

NAME = re.compile(rf"(\d{{6,}})_({'|'.join((*SEGMENTS, *FILE_LOCKS))})")
STARTING = SHM / f"infini_ds-{os.getuid()}.lock"
HELD = 0o100  # bit of the mode of a segment whose life is told by a lock; streaming's own are told by who maps them
PATIENCE = 60.0  # seconds to wait for another run that is just starting


@dataclass(frozen=True)
class Kept:
    """All that one dataset keeps under its number. living: some process uses it, or it is not ours to tell."""

    number: int
    files: tuple[Path, ...]
    uid: int
    living: bool

    @property
    def owner(self) -> str:
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    @property
    def stale(self) -> bool:
        return not self.living

    @property
    def ours(self) -> bool:
        return self.uid == os.getuid()

    def remove(self) -> None:
        for file in self.files:
            with suppress(OSError):
                file.unlink()


def hold(name: str) -> int:
    """Tell others that this process uses a segment, by a lock that the kernel drops with the process. Returns the file
    descriptor, which has to stay open. /proc tells less: it does not show processes of another container that shares
    /dev/shm, and runs that start later map the segments of earlier ones as they look for a free number.
    """
    segment = os.open(SHM / name.lstrip("/"), os.O_RDWR)
    fcntl.flock(segment, fcntl.LOCK_SH)
    os.fchmod(segment, 0o600 | HELD)
    return segment


def find_kept() -> list[Kept]:
    """What streaming keeps on this machine, of every user, by number."""
    groups: dict[tuple[int, int], list[Path]] = {}  # one user's file locks may stand under the number of another
    inodes: dict[int, set[int]] = {}
    held: set[int] = set()
    for folder in (SHM, Path(tempfile.gettempdir())):
        for file in folder.iterdir():
            if match := NAME.fullmatch(file.name):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    groups.setdefault((int(match[1]), status.st_uid), []).append(file)
                    if folder == SHM:
                        inodes.setdefault(int(match[1]), set()).add(status.st_ino)
                        held |= {int(match[1])} if status.st_mode & HELD else set()
    used, unseen = _used_segments()
    kept = []
    for (number, uid), files in sorted(groups.items()):
        mapped = number not in held and not used.isdisjoint(inodes.get(number, ()))
        kept.append(Kept(number, tuple(files), uid, uid in unseen or mapped or any(map(_is_locked, files))))
    return kept


def _used_segments() -> tuple[set[int], set[int]]:
    """Inodes of the segments that some process has mapped, and the other users of whose processes we cannot tell."""
    used, unseen = set(), set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text()
        except PermissionError:
            with suppress(OSError):  # one of our own that hides its memory is no training
                unseen |= {process.stat().st_uid} - {os.getuid()}
            continue
        except OSError:  # it has just ended
            continue
        used |= {int(inode) for inode in re.findall(rf" (\d+) +{SHM}/\d+_", maps)}
    return used, unseen


def _is_locked(file: Path) -> bool:
    try:
        descriptor = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:  # not ours
        return False
    try:
        return not _locks(descriptor)
    finally:
        os.close(descriptor)


def remove_stale() -> list[Kept]:
    """Remove what this user's dead runs left, while no other run starts; returns it."""
    with _no_other_start():
        return _remove_stale()


@contextmanager
def one_start_at_a_time(first_on_node: bool) -> Iterator[None]:
    """Make datasets inside. What dead runs left is removed first. Other runs of this user on this node wait, so that
    none takes for a dead run's what is just being made.
    """
    with _no_other_start() if first_on_node else nullcontext():
        if first_on_node:
            _remove_stale()
        if dist.is_initialized():
            dist.barrier()
        yield


@contextmanager
def _no_other_start() -> Iterator[None]:
    """A run that waits for other nodes inside is not waited for longer than PATIENCE: two could wait for each other."""
    lock, deadline = os.open(STARTING, os.O_RDWR | os.O_CREAT, 0o600), time.monotonic() + PATIENCE
    try:
        while not _locks(lock) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield
    finally:
        os.close(lock)


def _remove_stale() -> list[Kept]:
    stale = [kept for kept in find_kept() if kept.stale and kept.ours]
    for kept in stale:
        kept.remove()
    return stale


def _locks(descriptor: int) -> bool:
    """Take the lock of a file, if no other process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
