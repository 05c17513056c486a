"""Shards of one folder: expanded and fetched safely beside other runs, and checked against their checksums."""

import errno
import logging
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from infini_ds.streaming_compat.library import CloudDownloader, FileInfo, Reader, Stream, retry
from infini_ds.utils.errors import UserError

logger = logging.getLogger(__name__)

HASH = "xxh64"  # the checksum that data_prep writes into the index
UNFINISHED = ".unfinished-"  # in the name of a file that a process is writing


class ShardError(UserError):
    """A shard cannot be read, and the user can repair it."""


def is_intact(file: Path, size: int, hashes: Mapping[str, str]) -> bool:
    """Return whether a file has the size and, if the index gives one, the checksum of its entry in the index."""
    if file.stat().st_size != size:
        return False
    digest = xxhash.xxh64()
    with file.open("rb") as data:
        while chunk := data.read(1 << 24):
            digest.update(chunk)
    return hashes.get(HASH) in (None, digest.hexdigest())


def private_name(file: str) -> str:
    """Return a name beside `file` that no other process uses, on any machine that shares the file system."""
    return f"{file}{UNFINISHED}{socket.gethostname()}-{os.getpid()}"


class ShardStream(Stream):
    """A stream whose folder any number of runs and nodes may read at the same time.

    Args:
        remote_folder: address that shards are fetched from; None if they are in `local`, which is then the only copy.
            It is not streaming's `remote`, with which streaming refuses a `local` that another run reads.
        bounded: whether the dataset has a cache limit, for which streaming has to know at the start what is in `local`.
        options: further arguments of `Stream`.
    """

    def __init__(self, *, remote_folder: str | None, bounded: bool, **options: Any):
        super().__init__(**options, validate_hash=HASH)
        self.remote_folder, self.bounded = remote_folder, bounded
        self._downloader = CloudDownloader.get(remote_folder)

    def apply_default(self, default: dict[str, Any]) -> None:
        """Keep compressed shards that are the only copy; without a compressed one, a fetched shard takes less room."""
        super().apply_default(default)
        self.keep_zip = self.safe_keep_zip = self.remote_folder is None

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: np.ndarray) -> None:
        """Leave the files in the local folder alone, and let streaming ask for each shard once.

        streaming deletes an expanded shard if the compressed one is missing, though it may be the only copy. In
        https://github.com/mosaicml/streaming/issues/400 that is called intended.
        """
        if self.bounded:
            super().set_up_local(shards, cache_usage_per_shard)

    def prepare_shard(self, shard: Reader) -> int:
        """Make a shard ready to be read: fetch it, expand it, and check it. Returns the change of the cache's size.

        streaming checks the checksum of what it expands or fetches, and never that of a shard that was expanded earlier
        (no upstream issue is known). A damaged shard is restored from its compressed form or from where it is fetched.

        Raises:
            ShardError: the shard is damaged or missing and cannot be restored, or the disk is full.
        """
        ((raw, packed),) = shard.file_pairs  # MDS has one file a shard
        reason: Exception | None = None
        for _ in range(2):  # another run may have expanded the shard, and removed what it was expanded from
            try:
                self._remove_damaged(raw, packed)
                return super().prepare_shard(shard)
            except ShardError:
                raise
            except (ValueError, OSError) as error:
                reason = error
        assert reason is not None
        raise self._explain(raw, reason) from reason

    def _remove_damaged(self, raw: FileInfo, packed: FileInfo | None) -> None:
        """Remove the files of a shard that are damaged and can be restored.

        The expanded file is checked first. If it is intact, the compressed one is not needed.
        """
        for info in filter(None, (raw, packed)):
            file = Path(self.local, self.split, info.basename)
            if not file.is_file():
                continue
            if is_intact(file, info.bytes, info.hashes):
                return
            origin = self.remote_folder
            if origin is None and info is raw and packed and Path(self.local, self.split, packed.basename).is_file():
                origin = packed.basename
            if origin is None:
                raise ShardError(
                    f"{file} is damaged, its checksum is not that of index.json: copy it again from its origin, or "
                    "prepare the data again with --force"
                )
            logger.warning(f"{file} is damaged: restoring it from {origin}")
            file.unlink(missing_ok=True)

    def _explain(self, raw: FileInfo, reason: Exception) -> ShardError:
        """Return the error for a shard that could not be made ready in two attempts."""
        name = Path(self.local, self.split, raw.basename)
        if "Checksum" in str(reason):
            return ShardError(
                f"{name} was fetched twice from {self.remote_folder} with a checksum that is not that of index.json: "
                "repair it there, or prepare the data again"
            )
        if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.local).free / 2**20
            return ShardError(
                f"the disk is too full to expand {name}, which takes {raw.bytes / 2**20:,.1f} MiB, and {free:,.1f} MiB "
                "are free: free some space, or read the data through a cache on another disk, as "
                f"file://{Path(self.local).resolve()}"
            )
        if self.remote_folder is None and isinstance(reason, FileNotFoundError):
            return ShardError(
                f"{name} is missing: copy it again from its origin, or prepare the data again with --force"
            )
        return ShardError(f"{name} cannot be made ready to read ({reason}): check the folder and its file system")

    def _decompress_shard_part(
        self, zip_info: FileInfo, zip_filename: str, raw_filename: str, compression: str | None
    ) -> None:
        """Expand a shard under a private name, and rename it.

        streaming expands into one fixed name, so of two runs or nodes that expand the same shard at the same time one
        fails to rename it: https://github.com/mosaicml/streaming/issues/863
        """
        private = private_name(raw_filename)
        try:
            super()._decompress_shard_part(zip_info, zip_filename, private, compression)
            os.replace(private, raw_filename)
        finally:
            for left in (private, private + ".tmp"):  # the latter is streaming's own
                Path(left).unlink(missing_ok=True)

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        """Fetch a file under a private name, and rename it.

        streaming fetches into one fixed name, as it expands. For the index this is
        https://github.com/mosaicml/streaming/issues/868
        """
        file = os.path.join(self.local, self.split, to_basename or from_basename)
        if self.remote_folder is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)
        private = private_name(file)
        attempt = retry(clean_up_fn=self._downloader.clean_up, num_attempts=self.download_retry)
        attempt(lambda: self._downloader.download(f"{self.remote_folder}/{self.split}/{from_basename}", private))()
        os.replace(private, file)
        return file
