"""Prepared data that is read: folders that `data_prep` wrote, local or remote, and how much of each an epoch takes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.manifest import Manifest, load_manifest
from infini_ds.data.remote import fetch_small_files, is_remote, remote_address
from infini_ds.streaming_compat.library import reader_from_json
from infini_ds.utils.errors import UserError
from infini_ds.utils.paths import user_path


@dataclass(frozen=True)
class StreamSpec:
    """A choice of prepared data.

    Attributes:
        option: the name of the option that made the choice, for errors.
        path: a folder or an address.
        proportion: share of an epoch, relative to the other streams'.
        repeat: how often an epoch takes each row.
    """

    option: str
    path: str
    proportion: float | None = None
    repeat: float | None = None


@dataclass(frozen=True)
class DataSource:
    """Prepared data that was found and checked.

    Attributes:
        option: the name of the option that chose it, for errors.
        folder: where its small files are, and its shards or their cache.
        remote: where its shards are fetched from; None if they are in `folder`.
        proportion, repeat: as in `StreamSpec`.
    """

    option: str
    folder: Path
    remote: str | None
    manifest: Manifest
    proportion: float | None = None
    repeat: float | None = None

    @property
    def rows(self) -> int:
        """Number of training rows."""
        return sum(shard["samples"] for shard in self.shards("train"))

    def shards(self, split: str) -> list[dict[str, Any]]:
        """Return the entries of a split's index, one a shard, as MDS writes them."""
        return json.loads((self.folder / split / "index.json").read_text())["shards"]


def open_sources(specs: Sequence[StreamSpec], cache: str, cache_option: str) -> list[DataSource]:
    """Find the data of all streams, and check that they go together.

    Args:
        cache: folder for what is fetched from remote addresses.
        cache_option: the name of the option that chose it, for errors.
    Raises:
        UserError: data does not exist or is not finished, its address cannot be read, or the streams have different
            tokenizers or lengths of rows.
    """
    sources = [_open(spec, Path(cache), cache_option) for spec in specs]
    first = sources[0]
    for source, spec in zip(sources[1:], specs[1:], strict=True):
        for what, theirs, ours in (
            ("rows of another length", source.manifest.sequence_length, first.manifest.sequence_length),
            ("another tokenizer", source.manifest.tokenizer.sha256, first.manifest.tokenizer.sha256),
        ):
            if theirs != ours:
                raise UserError(
                    f"{spec.option}={spec.path} has {what} than {first.option}={specs[0].path} ({theirs}, not {ours}): "
                    f"prepare it with --tokenizer {first.folder / 'tokenizer'} "
                    f"--sequence-length {first.manifest.sequence_length}"
                )
        if source.folder.resolve() in [other.folder.resolve() for other in sources if other is not source]:
            raise UserError(f"{spec.option}={spec.path} is named twice: name it once, with repeat or proportion")
    return sources


def open_stages(specs: Sequence[StreamSpec], cache: str, cache_option: str) -> list[DataSource]:
    """Find the data of stages that follow each other, and check that they have the same tokenizer.

    Args:
        cache, cache_option: as for `open_sources`.
    Raises:
        UserError: data does not exist or is not finished, its address cannot be read, or tokenizers differ.
    """
    sources = [_open(spec, Path(cache), cache_option) for spec in specs]
    first = sources[0]
    for source, spec in zip(sources[1:], specs[1:], strict=True):
        theirs, ours = source.manifest.tokenizer.sha256, first.manifest.tokenizer.sha256
        if theirs != ours:
            raise UserError(
                f"{spec.option}={spec.path} has another tokenizer than {first.option}={specs[0].path} ({theirs}, not "
                f"{ours}): prepare it with --tokenizer {first.folder / 'tokenizer'}"
            )
    return sources


def _open(spec: StreamSpec, cache: Path, cache_option: str) -> DataSource:
    what = f"{spec.option}={spec.path}"
    if is_remote(spec.path):
        remote: str | None = remote_address(spec.path)
        folder = fetch_small_files(what, remote_address(spec.path), cache, cache_option)
    else:
        remote, folder = None, user_path(spec.path)
    try:
        manifest = load_manifest(folder)
    except UserError as error:
        raise UserError(f"{what}: {str(error).removeprefix(f'{folder}: ')}") from error
    source = DataSource(spec.option, folder, remote, manifest, spec.proportion, spec.repeat)
    for split in ("train", "validation"):
        index = folder / split / "index.json"
        if not index.is_file():
            raise UserError(f"{what} has no {split}/index.json: prepare it with python -m data_prep")
        try:
            for shard in source.shards(split):
                reader_from_json(str(folder), split, shard)
        except (ValueError, KeyError, TypeError) as error:  # the index has no checksum, but most damage shows here
            raise UserError(
                f"{index} is damaged ({error!r}): copy it again from its origin, or prepare the data again with --force"
            ) from error
    return source
