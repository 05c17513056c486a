"""Shards as streaming reads them, and what it leaves open: hashes of what lies here, two runs at one shard, errors."""

import errno
import os
import shutil
import socket
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from infini_ds.streaming_compat.library import CloudDownloader, ShardState, Stream, StreamingDataset, retry
from infini_ds.streaming_compat.shared_memory import hold
from infini_ds.utils.errors import UserError

HASH = "xxh64"  # that data_prep writes into the index
UNFINISHED = ".unfinished-"  # in the name of a file that a process is writing


class ShardError(UserError):
    """A shard cannot be read, and the user can mend it."""


def is_whole(file: Path, size: int, hashes: dict[str, str]) -> bool:
    """Whether a file has the size and, where it is named, the hash that an index says."""
    if file.stat().st_size != size:
        return False
    digest = xxhash.xxh64()
    with file.open("rb") as data:
        while chunk := data.read(1 << 24):
            digest.update(chunk)
    return hashes.get(HASH) in (None, digest.hexdigest())


def _own_name(file: str) -> str:
    """Beside `file`, a name that no process on any machine has: the file system may be shared."""
    return f"{file}{UNFINISHED}{socket.gethostname()}-{os.getpid()}"


class ShardStream(Stream):
    """A folder of shards. streaming expands and fetches under one fixed name, where two runs, or two nodes, would write
    into the same file; here each process has a name of its own, and the last one to finish wins with the same bytes. So
    runs may also share the folder that shards from far away are kept in, which streaming by itself refuses.
    streaming checks a hash when it expands; here a shard that was expanded earlier is checked too, once a run and
    node, when it is first used. A damaged one is made anew from its compressed form or its remote, if there is one.
    """

    def __init__(self, *, far: str | None, bounded: bool, **options):
        super().__init__(**options, validate_hash=HASH)
        self.far = far  # where the shards come from, if they do not lie here
        self.bounded = bounded  # by a cache limit: then streaming has to know at the start what is there
        self._downloader = CloudDownloader.get(far)

    def apply_default(self, default: dict) -> None:
        super().apply_default(default)
        self.keep_zip = self.safe_keep_zip = self.far is None

    def set_up_local(self, shards, cache_usage_per_shard) -> None:
        """Leave what is there alone, and let streaming believe that nothing is: so it asks for each shard once."""
        if self.bounded:
            super().set_up_local(shards, cache_usage_per_shard)

    def prepare_shard(self, shard) -> int:
        """Raises ShardError: the shard is damaged and cannot be made anew, or there is no room for it."""
        ((raw, packed),) = shard.file_pairs  # MDS has one file a shard
        name = Path(self.local, self.split, raw.basename)
        for _ in range(2):
            try:
                self._drop_damaged(raw, packed)
                return super().prepare_shard(shard)
            except ShardError:
                raise
            except (ValueError, OSError) as error:
                reason = error  # and once more: another run may have expanded the shard, and removed what it came from
        if "Checksum" in str(reason):
            raise ShardError(
                f"{name} was fetched twice from {self.far} and has another hash than its index names: mend it there, "
                "or prepare the data anew"
            )
        if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.local).free / 2**20
            raise ShardError(
                f"no room to expand {name}, of {raw.bytes / 2**20:,.1f} MiB, as {free:,.1f} MiB are free: make room, "
                "or read the data through data.cache on another disk (file://)"
            ) from reason
        if self.far is None and isinstance(reason, FileNotFoundError):
            raise ShardError(
                f"{name} is missing: copy it again from where it came, or prepare the data anew with --force"
            ) from reason
        raise ShardError(f"{name} cannot be made ready ({reason}): python launch/doctor.py says more") from reason

    def _drop_damaged(self, raw, packed) -> None:
        """Remove what is here and damaged and can be had again; the expanded form first, which may be enough."""
        for info in filter(None, (raw, packed)):
            file = Path(self.local, self.split, info.basename)
            if not file.is_file():
                continue
            if is_whole(file, info.bytes, info.hashes):
                return  # the compressed form is not needed
            again = self.far or (info is raw and packed and Path(self.local, self.split, packed.basename).is_file())
            if not again:
                raise ShardError(
                    f"{file} is damaged: its hash is not what index.json names. Copy it again from where it came, or "
                    "prepare the data anew with --force"
                )
            print(f"{file} is damaged: it is made anew from {self.far or packed.basename}", file=sys.stderr)
            file.unlink(missing_ok=True)

    def _decompress_shard_part(self, zip_info, zip_filename, raw_filename, compression) -> None:
        own = _own_name(raw_filename)
        try:
            super()._decompress_shard_part(zip_info, zip_filename, own, compression)
            os.replace(own, raw_filename)
        finally:
            for left in (own, own + ".tmp"):  # the latter is streaming's own
                Path(left).unlink(missing_ok=True)

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        file = os.path.join(self.local, self.split, to_basename or from_basename)
        own = _own_name(file)
        attempt = retry(clean_up_fn=self._downloader.clean_up, num_attempts=self.download_retry)
        attempt(lambda: self._downloader.download(f"{self.far}/{self.split}/{from_basename}", own))()
        os.replace(own, file)
        return file


@contextmanager
def _counted(iterator) -> Iterator[None]:
    """Count a thread that fails as one that has ended: streaming waits for them all."""
    try:
        yield
    except BaseException:
        iterator.on_exit()
        raise


class ShardDataset(StreamingDataset):
    """Rows with their number, `row`, counted through all streams; and an error in a thread of streaming is raised where
    the rows are asked for, in place of a stack on standard error and an epoch that seems to be over."""

    failure: BaseException | None = None

    def __init__(self, **options):
        super().__init__(**options)
        weakref.finalize(self, os.close, hold(self._locals_shm.shm.name))

    @property
    def data_rank_and_size(self) -> tuple[int, int]:
        """Return which part of each global batch this rank reads, and the number of parts."""
        return self._parallel_rank_world.rank, self._parallel_rank_world.num_ranks

    def on_exception(self, future: Future) -> None:
        if future.exception() is not None:
            self.failure = future.exception()
            self._event.set()

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """As streaming's, but a shard that cannot be made ready is not left for others to wait for without end."""
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            self._shard_states[shard_id] = ShardState.REMOTE
            if self._cache_filelock.is_locked:
                self._cache_filelock.release()
            raise

    def __iter__(self) -> Iterator[dict[str, Any]]:
        threads = None
        try:
            for row in super().__iter__():
                threads = self._iterator
                yield row
        except RuntimeError:  # so streaming says that a thread has failed
            if self.failure is None:
                raise
        finally:  # else, where an epoch is left early, they would look for work, and keep this dataset, without end
            if threads is not None:
                threads.non_blocking_exit()
        if self.failure is not None:
            raise self.failure

    def _prepare_thread(self, it) -> None:
        with _counted(it):
            super()._prepare_thread(it)

    def _ready_thread(self, it) -> None:
        with _counted(it):
            super()._ready_thread(it)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        return super().get_item(sample_id, retry) | {"row": sample_id}
