"""What is wrong on this node before a run finds out: each check gives findings, and mends what is safe if told to."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet

from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.recipe import Recipe
from infini_ds.config.resolve import resolve
from infini_ds.data.sources import DataSource
from infini_ds.distributed.environment import DistEnv
from infini_ds.model import InfiniGPTNeoConfig
from infini_ds.planning.memory_estimate import parameters
from infini_ds.streaming_compat.shm_prefix import SHM
from infini_ds.streaming_compat.stale_memory import find_shared_files, remove_stale
from infini_ds.streaming_compat.stream import UNFINISHED, is_intact
from infini_ds.utils.errors import UserError

MIB = 2**20
BYTES_A_PARAMETER = 16  # of a checkpoint: fp32 weights, and the optimizer's copy of them with two moments
ABANDONED = 3600.0  # seconds since the last change, from which on an unfinished file has no writer any more

# Versions that are known to be bad, and why.
BAD_VERSIONS = [
    ("deepspeed", "==0.18.9", "it modifies a view in place, and the backward pass of a checkpointed segment fails"),
    ("deepspeed", "<0.19.4", "ZeRO-2 in bf16 may give wrong gradients where a layer is used many times a step (8224)"),
    ("mosaicml-streaming", "<0.13", "its shards and states are those of another version"),
    ("torch", "<2.6", "the model is not tried on it"),
    ("transformers", "<4.57", "the model is not tried on it"),
]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. state: ok, warning or problem; the last is what a run would fail of."""

    check: str
    state: str
    sentence: str


def check_versions(installed=version) -> Iterator[Finding]:
    bad = []
    for package, versions, reason in BAD_VERSIONS:
        try:
            found = installed(package)
        except PackageNotFoundError:
            bad.append(f"{package} is not installed")
            continue
        if found in SpecifierSet(versions, prereleases=True):
            bad.append(f"{package} {found} ({versions}): {reason}; install what requirements.lock names")
    packages = dict.fromkeys(package for package, _, _ in BAD_VERSIONS)
    fine = ", ".join(f"{package} {installed(package)}" for package in packages) if not bad else ""
    yield from (Finding("versions", "problem", sentence) for sentence in bad)
    if not bad:
        yield Finding("versions", "ok", fine)


def check_shared_memory(fix: bool) -> Iterator[Finding]:
    """Segments and file locks of streaming, by owner, and whether that owner lives."""
    kept = find_shared_files()
    living = sum(one.in_use and bool(_in_shm(one.files)) for one in kept)
    users = sorted({one.owner for one in kept if one.stale})
    for user in users:
        stale = [one for one in kept if one.stale and one.owner == user]
        segments = [file for one in stale for file in _in_shm(one.files)]
        locks = sum(len(one.files) for one in stale) - len(segments)
        what = f"{len(segments)} segments and {locks} file locks of dead runs of {user}"
        if not stale[0].ours:
            yield Finding("shared memory", "warning", f"{what}: they are not yours to remove; tell {user}")
        elif fix:
            remove_stale()
            yield Finding("shared memory", "ok", f"removed {what}")
        elif segments:
            yield Finding("shared memory", "warning", f"{what}: --fix removes them, and so does the next run")
    if not any(one.stale and _in_shm(one.files) for one in kept):
        yield Finding("shared memory", "ok", f"nothing of dead runs; {living} datasets of living ones")


def _in_shm(files: tuple[Path, ...]) -> list[Path]:
    return [file for file in files if file.parent == SHM]


def check_room_in_shm(
    sources: list[DataSource], shape: BatchShape, workers: int, ranks: int, folder: Path = SHM
) -> Iterator[Finding]:
    """streaming keeps the order of an epoch there, and workers hand over their batches there."""
    rows = sum(shard["samples"] for source in sources for shard in source.shards("train"))
    batch = shape.rank_rows * sources[0].manifest.sequence_length * 4 * 8  # four tensors of int64
    need = 8 * rows + ranks * workers * 3 * batch  # a worker holds two batches ahead and makes one
    yield _room("/dev/shm", folder, need, "give the job more (docker run --shm-size), or lower data.workers")


def check_room_for_run(recipe: Recipe, config: InfiniGPTNeoConfig) -> Iterator[Finding]:
    count = parameters(config)
    need = (recipe.checkpoint.keep_last + 1) * count * BYTES_A_PARAMETER
    yield _writable("run", _existing(recipe.folder)) or _room(
        "run", _existing(recipe.folder), need, "make room, give another output=, or lower checkpoint.keep_last"
    )


def check_room_for_data(recipe: Recipe, sources: list[DataSource], cache_limit: int | None) -> Iterator[Finding]:
    """Room to expand shards where they lie, or to fetch them."""
    for source in sources:
        remedy = f"make room, or read it through data.cache on another disk: file://{source.folder.resolve()}"
        if source.remote:
            remedy = "make room, or give another data.cache= or a lower data.cache_limit="
        shards = [(split, shard) for split in ("train", "validation") for shard in source.shards(split)]
        missing = sum(
            shard["raw_data"]["bytes"]
            for split, shard in shards
            if not (source.folder / split / shard["raw_data"]["basename"]).is_file()
        )
        need = missing if cache_limit is None else min(missing, cache_limit)
        finding = _writable("data", source.folder) if need else None
        yield finding or _room("data", source.folder, need, remedy)


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _writable(check: str, folder: Path) -> Finding | None:
    if os.access(folder, os.W_OK | os.X_OK):
        return None
    remedy = (
        "give another output="
        if check == "run"
        else f"read it through data.cache: file://{folder.resolve()} as its path"
    )
    return Finding(check, "problem", f"{folder} may not be written by this user: {remedy}")


def _room(check: str, folder: Path, need: int, remedy: str) -> Finding:
    free = shutil.disk_usage(folder).free
    sizes = f"{folder} has {free / MIB:,.0f} MiB free, and {need / MIB:,.0f} MiB are needed"
    if free < need:
        return Finding(check, "problem", f"{sizes}: {remedy}")
    if free < 1.2 * need:
        return Finding(check, "warning", f"{sizes}, which is close: {remedy}")
    return Finding(check, "ok", sizes)


def check_shards(source: DataSource, fix: bool) -> Iterator[Finding]:
    """Every shard that lies here against the hashes of its index."""
    checked, size, bad = 0, 0, False
    for split in ("train", "validation"):
        for shard in source.shards(split):
            infos = [info for info in (shard["raw_data"], shard["zip_data"]) if info]
            files = {source.folder / split / info["basename"]: info for info in infos}
            there = {file: info for file, info in files.items() if file.is_file()}
            whole = [file for file, info in there.items() if is_intact(file, info["bytes"], info["hashes"])]
            checked, size = checked + bool(there), size + sum(info["bytes"] for info in there.values())
            damaged = [file for file in there if file not in whole]
            for file in damaged:
                bad = True
                again = source.remote or next((str(other) for other in whole if other.suffix != ".mds"), None)
                if again is None:
                    remedy = "copy it again from where it came, or prepare the data anew with --force"
                    yield Finding("shards", "problem", f"{file} is damaged: {remedy}")
                elif fix:
                    file.unlink(missing_ok=True)
                    yield Finding(
                        "shards", "ok", f"removed {file}, which was damaged; a run makes it anew from {again}"
                    )
                else:
                    yield Finding(
                        "shards", "warning", f"{file} is damaged: a run makes it anew from {again}, --fix removes it"
                    )
            if not there and not source.remote:
                bad = True
                yield Finding("shards", "problem", f"{next(iter(files))} is missing: copy it again from where it came")
    if not bad:
        yield Finding(
            "shards", "ok", f"{checked} shards in {source.folder} as index.json says, {size / MIB:,.1f} MiB read"
        )


def check_unfinished(source: DataSource, fix: bool) -> Iterator[Finding]:
    """Files that a killed process was writing."""
    files = [*source.folder.rglob(f"*{UNFINISHED}*"), *source.folder.rglob("*.mds.tmp")]
    old = [file for file in files if time.time() - file.stat().st_mtime > ABANDONED]
    if old and fix:
        for file in old:
            file.unlink(missing_ok=True)
        yield Finding("leftovers", "ok", f"removed {len(old)} unfinished files of killed runs in {source.folder}")
    elif old:
        what = f"{len(old)} unfinished files of killed runs in {source.folder}, such as {old[0].name}"
        yield Finding("leftovers", "warning", f"{what}: --fix removes them")


def examine(recipe: Recipe, process: DistEnv, fix: bool, require_data: bool = True) -> Iterator[Finding]:
    """All checks of this node but that of the ranks.

    Args:
        require_data: False for data that the run itself prepares, if they are not there.
    """
    yield from check_versions()
    yield from check_shared_memory(fix)
    try:
        run = resolve(recipe, process, require_data)
    except UserError as error:
        yield Finding("recipe", "problem", str(error))
        return
    sources, shape, limit = list(run.sources), run.batch_shape, run.cache_limit
    yield from check_room_for_run(recipe, run.model_config)
    if not sources:
        yield Finding("data", "ok", f"{recipe.data.path} is not prepared yet: the run prepares it first")
        return
    if limit is not None:
        yield Finding("cache limit", "ok", f"{limit / MIB:,.0f} MiB, and every shard has another copy far away")
    yield from check_room_in_shm(sources, shape, recipe.data.workers, process.local_world_size)
    yield from check_room_for_data(recipe, sources, limit)
    for source in sources:
        yield from check_unfinished(source, fix)
        yield from check_shards(source, fix)
