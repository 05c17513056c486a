"""Shared memory and file locks of datasets: which are in use, and the removal of those that killed runs left.

streaming names the segments of a dataset by a prefix, `/dev/shm/000003_locals` and others, and its file locks alike. It
removes them as the process exits, so a run that is killed leaves them. They occupy prefixes and memory, and can keep
later runs of plain streaming from starting:
https://github.com/mosaicml/streaming/issues/573, https://github.com/mosaicml/streaming/issues/781. Its remedy,
`clean_stale_shared_memory`, also removes what running processes use, and stops at the first free prefix.
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

from infini_ds.streaming_compat.shm_prefix import FILE_LOCKS, SEGMENTS, SHM

NAME = re.compile(rf"(\d{{6,}})_({'|'.join((*SEGMENTS, *FILE_LOCKS))})")
START_LOCK = SHM / f"infini_ds-{os.getuid()}.lock"
# Bit of the mode of a segment that its processes lock. Without it, as in plain streaming, a segment is in use if a
# process has mapped it.
LOCKED = 0o100
START_TIMEOUT = 60.0  # seconds to wait for another run that is starting


@dataclass(frozen=True)
class SharedFiles:
    """The segments and file locks of one dataset.

    Attributes:
        in_use: whether a process uses them, or may use them as far as this user is permitted to see.
    """

    prefix: int
    files: tuple[Path, ...]
    uid: int
    in_use: bool

    @property
    def owner(self) -> str:
        """Name of the user that created them."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    @property
    def stale(self) -> bool:
        return not self.in_use

    @property
    def ours(self) -> bool:
        """Whether this user created them, and so may remove them."""
        return self.uid == os.getuid()

    def remove(self) -> None:
        for file in self.files:
            with suppress(OSError):
                file.unlink()


def lock_segment(name: str) -> int:
    """Show other processes that this one uses a segment, by a lock that the kernel releases when the process ends.

    /proc shows less: not the processes of another container that shares /dev/shm, and also processes of plain streaming
    that only mapped the segment to look for a free prefix.

    Returns:
        The file descriptor that has to stay open.
    """
    segment = os.open(SHM / name.lstrip("/"), os.O_RDWR)
    fcntl.flock(segment, fcntl.LOCK_SH)
    os.fchmod(segment, 0o600 | LOCKED)
    return segment


def find_shared_files() -> list[SharedFiles]:
    """Return what datasets of all users have on this machine, by prefix."""
    groups: dict[tuple[int, int], list[Path]] = {}  # one user's file locks may have the prefix of another's segments
    inodes: dict[int, set[int]] = {}
    with_lock: set[int] = set()
    for folder in (SHM, Path(tempfile.gettempdir())):
        for file in folder.iterdir():
            if match := NAME.fullmatch(file.name):
                with suppress(FileNotFoundError):
                    status, prefix = file.stat(), int(match[1])
                    groups.setdefault((prefix, status.st_uid), []).append(file)
                    if folder == SHM:
                        inodes.setdefault(prefix, set()).add(status.st_ino)
                        with_lock |= {prefix} if status.st_mode & LOCKED else set()
    mapped, unseen = _mapped_segments()
    found = []
    for (prefix, uid), files in sorted(groups.items()):
        is_mapped = prefix not in with_lock and not mapped.isdisjoint(inodes.get(prefix, ()))
        in_use = uid in unseen or is_mapped or any(map(_is_locked, files))
        found.append(SharedFiles(prefix, tuple(files), uid, in_use))
    return found


def _mapped_segments() -> tuple[set[int], set[int]]:
    """Return the inodes of segments that some process has mapped, and the users whose processes cannot be inspected."""
    mapped, unseen = set(), set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text()
        except PermissionError:
            with suppress(OSError):  # a process of this user that hides its memory is not a training
                unseen |= {process.stat().st_uid} - {os.getuid()}
            continue
        except OSError:  # it has just ended
            continue
        mapped |= {int(inode) for inode in re.findall(rf" (\d+) +{SHM}/\d+_", maps)}
    return mapped, unseen


def _is_locked(file: Path) -> bool:
    """Return whether another process locks a file; False for a file that this user may not open."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def remove_stale() -> list[SharedFiles]:
    """Remove what killed runs of this user left, while no other run is starting, and return it."""
    with _no_other_start():
        return _remove_stale()


@contextmanager
def one_start_at_a_time(first_on_node: bool) -> Iterator[None]:
    """Remove what killed runs left, then run the block, in which datasets are created.

    Other runs of this user on this node wait meanwhile, so that none takes what is just being created for stale.
    """
    with _no_other_start() if first_on_node else nullcontext():
        if first_on_node:
            _remove_stale()
        if dist.is_initialized():
            dist.barrier()
        yield


@contextmanager
def _no_other_start() -> Iterator[None]:
    """Run the block while no other run of this user starts on this node.

    A run that waits for its other nodes in the block is waited for no longer than START_TIMEOUT: two such runs could
    wait for each other.
    """
    lock, deadline = os.open(START_LOCK, os.O_RDWR | os.O_CREAT, 0o600), time.monotonic() + START_TIMEOUT
    try:
        while not _try_lock(lock) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield
    finally:
        os.close(lock)


def _remove_stale() -> list[SharedFiles]:
    stale = [shared for shared in find_shared_files() if shared.stale and shared.ours]
    for shared in stale:
        shared.remove()
    return stale


def _try_lock(descriptor: int) -> bool:
    """Lock a file exclusively. Return False if another process has a lock on it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
