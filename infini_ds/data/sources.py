"""Where rows come from: folders that `data_prep` made, here or far away, and how much of each an epoch takes."""

import importlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from data_prep.manifest import NAME, Manifest, load_manifest
from infini_ds.streaming_compat.library import CloudDownloader, reader_from_json
from infini_ds.utils.errors import UserError

HERE = "file://"  # a folder of this machine that is to be read as if it were far away, through the cache
# All but the shards: fetched at each start, since they say what the shards are.
SMALL_FILES = (
    *(NAME, "train/index.json", "validation/index.json"),
    *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
)
# What streaming imports for a kind of address, and what to install for it.
CLIENTS = {
    "s3": ("boto3", "boto3"),
    "gs": ("google.cloud.storage", "'google-cloud-storage<3.3'"),  # streaming 0.13's limit
    "hf": ("huggingface_hub", "huggingface_hub"),
    "azure": ("azure.storage.blob", "azure-storage-blob azure-identity"),
    "azure-dl": ("azure.storage.filedatalake", "azure-storage-file-datalake azure-identity"),
    "oci": ("oci", "oci"),
    "sftp": ("paramiko", "paramiko"),
    "dbfs": ("databricks.sdk", "databricks-sdk"),
    "alipan": ("alipcs_py", "AliPCS-py"),
}


class StreamChoice(Protocol):
    """What the recipe says of one stream; `path` is a folder or an address."""

    path: str
    proportion: float | None
    repeat: float | None


@dataclass(frozen=True)
class Source:
    """One stream. key: what names it in the recipe. remote: where its shards are fetched from, None if they lie in
    `folder`. proportion, repeat: its share of an epoch, or how often an epoch passes over it."""

    key: str
    folder: Path
    remote: str | None
    manifest: Manifest
    proportion: float | None = None
    repeat: float | None = None

    def shards(self, split: str) -> list[dict]:
        """The entries of the split's index, one a shard, as MDS writes them."""
        return json.loads((self.folder / split / "index.json").read_text())["shards"]

    def fingerprint(self) -> dict:
        """What tells these rows, and how many of them are taken, from others; not where they lie."""
        rows = [[shard["samples"], shard["raw_data"]["hashes"]] for shard in self.shards("train")]
        digest = xxhash.xxh3_64_hexdigest(json.dumps(rows, sort_keys=True))
        return {"shards": digest, "proportion": self.proportion, "repeat": self.repeat}


def find_sources(path: str, streams: Sequence[StreamChoice], cache: str) -> list[Source]:
    """The sources that a recipe names: `streams`, or else `path` alone. What is far away is kept in a folder of `cache`
    that belongs to its address and its index: data made anew under the same address are other data.

    Raises:
        UserError: a source is not there or not finished, its address cannot be read, or sources do not go together.
    """
    if not streams:
        return [_open("data.path", path, Path(cache))]
    sources = [
        _open(f"data.streams[{i}].path", stream.path, Path(cache), stream.proportion, stream.repeat)
        for i, stream in enumerate(streams)
    ]
    first = sources[0]
    for source, stream in zip(sources[1:], streams[1:], strict=True):
        for what, theirs, ours in (
            ("rows of another length", source.manifest.sequence_length, first.manifest.sequence_length),
            ("another tokenizer", source.manifest.tokenizer.sha256, first.manifest.tokenizer.sha256),
        ):
            if theirs != ours:
                raise UserError(
                    f"{source.key}={stream.path} has {what} than {first.key}={streams[0].path} ({theirs}, not {ours}): "
                    f"prepare it with --tokenizer {first.folder / 'tokenizer'} "
                    f"--sequence-length {first.manifest.sequence_length}"
                )
        if source.folder.resolve() in [other.folder.resolve() for other in sources if other is not source]:
            raise UserError(f"{source.key}={stream.path} is there twice: name it once, with repeat: or proportion:")
    return sources


def _open(key: str, path: str, cache: Path, proportion: float | None = None, repeat: float | None = None) -> Source:
    if "://" in path:
        remote = path.removeprefix(HERE).rstrip("/")
        folder = _fetch_small_files(f"{key}={path}", remote, cache)
    else:
        remote, folder = None, Path(path)
    source = Source(key, folder, remote, load_manifest(folder), proportion, repeat)
    for split in ("train", "validation"):
        index = folder / split / "index.json"
        if not index.is_file():
            raise UserError(f"{key}={path} has no {split}/index.json: prepare it with python -m data_prep")
        try:
            for shard in source.shards(split):
                reader_from_json(str(folder), split, shard)
        except (ValueError, KeyError, TypeError) as error:  # there is no hash of it, but most damage shows
            raise UserError(
                f"{index} is damaged ({error!r}): copy it again from where it came, or prepare the data anew "
                "with --force"
            ) from error
    return source


def _fetch_small_files(what: str, remote: str, cache: Path) -> Path:
    """Fetch all but the shards of `remote`; returns their folder below `cache`. Ranks that do it at once agree."""
    scheme = remote.partition("://")[0] if "://" in remote else None
    if scheme is not None:
        _check_client(what, scheme)
    if scheme == "hf" and not re.match("hf://datasets/[^/]+/[^/]+", remote):
        raise UserError(f"{what}: write it as hf://datasets/OWNER/NAME, or with a folder behind it")
    partial = cache / f".fetching-{uuid.uuid4().hex}"
    try:
        for name in SMALL_FILES:
            CloudDownloader.direct_download(f"{remote}/{name}", str(partial / name))
        digest = xxhash.xxh3_64(remote)
        for name in SMALL_FILES[:3]:
            digest.update((partial / name).read_bytes())
        folder = cache / f"{remote.rpartition('/')[2]}-{digest.hexdigest()}"
        if not folder.exists():
            try:
                os.rename(partial, folder)
            except OSError:
                if not folder.exists():  # else another rank was faster
                    raise
    except Exception as error:  # each client has errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{what} cannot be read ({reason}): check the address, your rights there, and that data.cache={cache} can "
            "be written"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _check_client(what: str, scheme: str) -> None:
    if scheme not in CLIENTS:
        raise UserError(f"{what}: {scheme}:// is not known; known are file, {', '.join(CLIENTS)}, or a folder")
    module, packages = CLIENTS[scheme]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} needs a package that is not installed ({error}): pip install {packages}") from error


def check_cache_limit(sources: list[Source], limit: int, rows_ahead: int) -> None:
    """Raise a UserError where `limit` bytes would cost the only copy of a shard, or are fewer than the shards of the
    `rows_ahead` rows that this node has asked for at a time: streaming would delete what it has just fetched.
    """
    for source in sources:
        if source.remote is None:
            raise UserError(
                f"data.cache_limit={limit} would delete shards of {source.key}={source.folder}, the only copy: name it "
                f"{HERE}{source.folder.resolve()}, which is then read through data.cache, or leave out data.cache_limit"
            )
    shards = [shard for source in sources for shard in source.shards("train")]
    largest = max(shard["raw_data"]["bytes"] + (shard["zip_data"] or {"bytes": 0})["bytes"] for shard in shards)
    indexes = sum((source.folder / "train" / "index.json").stat().st_size for source in sources)
    at_a_time = max(4, min(len(shards), rows_ahead))  # streaming refuses fewer than 4
    least = at_a_time * largest + indexes
    if limit < least:
        raise UserError(
            f"data.cache_limit={limit} is too little for the {at_a_time} shards of up to {largest} bytes that this "
            f"node reads at a time: give {least} or, better, room for as many shards as you can"
        )
