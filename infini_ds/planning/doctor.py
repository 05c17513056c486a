"""Find what is wrong on this node before a run does: one finding for each check, and repairs where they are safe.

for finding in check_node(load_recipe("launch/recipes/tiny-cpu.yaml"), detect_environment(), fix=False): ...
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet

from infini_ds.checkpoint.manager import complete_checkpoints
from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.recipe import Recipe
from infini_ds.config.resolve import ResolvedRun, resolve
from infini_ds.config.resume import check_same_run
from infini_ds.data.sources import DataSource
from infini_ds.distributed.environment import DistEnv
from infini_ds.planning.hardware import memory_free
from infini_ds.planning.memory_estimate import (
    HEADROOM,
    Workload,
    ZeroSharding,
    estimate_memory,
    largest_block,
    parameters,
)
from infini_ds.streaming_compat.shm_prefix import SHM
from infini_ds.streaming_compat.stale_memory import find_shared_files, remove_stale
from infini_ds.streaming_compat.stream import UNFINISHED, is_intact
from infini_ds.utils.errors import UserError

MIB, GIB = 2**20, 2**30
CHECKPOINT_BYTES = 16  # for each parameter: fp32 weights, and the optimizer's copy of them with two moments
ABANDONED = 3600.0  # seconds since its last change, after which an unfinished file has no writer

# Versions that are known to be bad, and why.
BAD_VERSIONS = [
    ("deepspeed", "==0.18.9", "it modifies a view in place, and the backward pass of a checkpointed segment fails"),
    ("deepspeed", "<0.19.4", "ZeRO-2 in bf16 may give wrong gradients where a layer is used many times a step (8224)"),
    ("mosaicml-streaming", "<0.13", "its shards and states are those of another version"),
    ("torch", "<2.6", "the model is not tested with it"),
    ("transformers", "<4.57", "the model is not tested with it"),
]


@dataclass(frozen=True)
class Finding:
    """The result of a check. A "problem" makes a run fail; a "warning" does not."""

    check: str
    state: Literal["ok", "warning", "problem"]
    sentence: str


def check_node(recipe: Recipe, environment: DistEnv, fix: bool, require_data: bool = True) -> Iterator[Finding]:
    """Run all checks of this node, and with `fix` repair what is safe to repair. The ranks are not tried here.

    Args:
        require_data: False for data that the run itself prepares first, if it is not there.
    """
    yield from check_versions()
    yield from check_shared_memory(fix)
    try:
        run = resolve(recipe, environment, require_data)
    except UserError as error:
        yield Finding("recipe", "problem", str(error))
        return
    yield from check_run_folder(run)
    run = run.at_largest_stage()
    yield check_memory(run)
    if run.cache_limit is not None:
        limit = f"{run.cache_limit / MIB:,.0f} MiB"
        yield Finding("cache limit", "ok", f"{limit}, and every shard has another copy at a remote address")
    sources = list({source.folder: source for source in run.all_sources}.values())
    if not sources:
        yield Finding("data", "ok", f"{recipe.data.path} is not prepared yet: the run prepares it first")
        return
    yield check_shm_space(sources, run.batch_shape, recipe.data.workers, environment.local_world_size)
    yield from check_data_space(sources, run.cache_limit)
    for source in sources:
        yield from check_unfinished(source, fix)
        yield from check_shards(source, fix)


def check_versions(installed: Callable[[str], str] = version) -> Iterator[Finding]:
    """Yield a problem for each package whose version is known to be bad. `installed` returns a package's version."""
    problems, found = [], {}
    for package, versions, reason in BAD_VERSIONS:
        try:
            found[package] = installed(package)
        except PackageNotFoundError:
            problems.append(f"{package} is not installed: install what requirements.lock names")
            continue
        if found[package] in SpecifierSet(versions, prereleases=True):
            problems.append(f"{package} {found[package]} ({versions}): {reason}; install what requirements.lock names")
    yield from (Finding("versions", "problem", sentence) for sentence in problems)
    if not problems:
        yield Finding("versions", "ok", ", ".join(f"{package} {version}" for package, version in found.items()))


def check_shared_memory(fix: bool) -> Iterator[Finding]:
    """Yield what killed runs left of streaming's segments and file locks, by owner; remove this user's with `fix`."""
    found = find_shared_files()
    stale = [one for one in found if one.stale]
    for owner in sorted({one.owner for one in stale}):
        theirs = [one for one in stale if one.owner == owner]
        segments = sum(len(_segments(one.files)) for one in theirs)
        locks = sum(len(one.files) for one in theirs) - segments
        what = f"{segments} segments and {locks} file locks of dead runs of {owner}"
        if not theirs[0].ours:
            yield Finding("shared memory", "warning", f"{what}: only {owner} may remove them")
        elif fix:
            remove_stale()
            yield Finding("shared memory", "ok", f"removed {what}")
        elif segments:
            yield Finding("shared memory", "warning", f"{what}: --fix removes them, and so does the next run")
    if not any(_segments(one.files) for one in stale):
        in_use = sum(one.in_use and bool(_segments(one.files)) for one in found)
        yield Finding("shared memory", "ok", f"nothing of dead runs; {in_use} datasets are in use")


def _segments(files: tuple[Path, ...]) -> list[Path]:
    return [file for file in files if file.parent == SHM]


def check_run_folder(run: ResolvedRun) -> Iterator[Finding]:
    """Yield whether the run's folder has space for its checkpoints and, if it has some, can be resumed."""
    recipe = run.recipe
    folder = _nearest_folder(recipe.folder)
    need = (recipe.checkpoint.keep_last + 1) * parameters(run.model_config) * CHECKPOINT_BYTES
    remedy = "free some space, give another output=, or lower checkpoint.keep_last"
    yield _not_writable("run", folder, "give another output=") or _space("run", folder, need, remedy)
    if not complete_checkpoints(recipe.folder):
        return
    if not recipe.resume:
        sentence = f"resume=false, but {recipe.folder} holds checkpoints: choose another name=, or remove that folder"
        yield Finding("resume", "problem", sentence)
        return
    assert run.data_fingerprint is not None, "resolve requires data"
    try:
        check_same_run(recipe, run.data_fingerprint)
    except UserError as error:
        yield Finding("resume", "problem", str(error))
    else:
        yield Finding("resume", "ok", f"the recipe and the data are those of the run in {recipe.folder}")


def check_memory(run: ResolvedRun) -> Finding:
    """Compare the estimate of a step's memory with what a rank of this node has free."""
    recipe, free = run.recipe, memory_free(run.environment)
    limit = int(free * (1 - HEADROOM))
    work = Workload.of(recipe, run.model_config, run.batch_shape, run.sequence_length, run.precision)
    sharding = ZeroSharding.from_json(run.deepspeed, run.dims.world_size)
    if recipe.model.segments_per_block == "auto":
        segments = largest_block(work, sharding, limit)
        work = work.in_blocks_of(segments or 1)
    peak = estimate_memory(work, sharding).peak
    sizes = f"a step takes about {peak / GIB:.1f} GiB of the {limit / GIB:.1f} GiB that a rank may take"
    block = f"in blocks of {work.block_segments} segments"
    if peak <= limit:
        return Finding("memory", "ok", f"{sizes}, {block}")
    state: Literal["warning", "problem"] = "problem" if recipe.model.segments_per_block == "auto" else "warning"
    return Finding("memory", state, f"{sizes}, {block}: lower batch.micro_rows={work.rows}, or see the plan of the run")


def check_shm_space(
    sources: list[DataSource], shape: BatchShape, workers: int, ranks: int, folder: Path = SHM
) -> Finding:
    """Check the space for the order of an epoch, which streaming keeps in shared memory, and for workers' batches."""
    rows = sum(source.rows for source in sources)
    tokens = max(source.manifest.sequence_length for source in sources)
    batch = shape.rank_rows * tokens * 4 * 8  # four tensors of int64
    need = 8 * rows + ranks * workers * 3 * batch  # a worker has two batches ready and a third in the making
    return _space("/dev/shm", folder, need, "give the job more (docker run --shm-size), or lower data.workers")


def check_data_space(sources: list[DataSource], cache_limit: int | None) -> Iterator[Finding]:
    """Yield whether there is space to expand the shards of each source in place, or to fetch them."""
    for source in sources:
        elsewhere = f"file://{source.folder.resolve()}"
        remedy = f"free some space, or read it through data.cache on another disk: {elsewhere}"
        if source.remote:
            remedy = "free some space, or give another data.cache= or a lower data.cache_limit="
        missing = sum(
            shard["raw_data"]["bytes"]
            for split in ("train", "validation")
            for shard in source.shards(split)
            if not (source.folder / split / shard["raw_data"]["basename"]).is_file()
        )
        need = missing if cache_limit is None else min(missing, cache_limit)
        finding = None
        if need:
            finding = _not_writable("data", source.folder, f"read it through data.cache: {elsewhere} as its path")
        yield finding or _space("data", source.folder, need, remedy)


def _nearest_folder(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _not_writable(check: str, folder: Path, remedy: str) -> Finding | None:
    if os.access(folder, os.W_OK | os.X_OK):
        return None
    return Finding(check, "problem", f"this user may not write to {folder}: {remedy}")


def _space(check: str, folder: Path, need: int, remedy: str) -> Finding:
    free = shutil.disk_usage(folder).free
    sizes = f"{folder} has {free / MIB:,.0f} MiB free, and {need / MIB:,.0f} MiB are needed"
    if free < need:
        return Finding(check, "problem", f"{sizes}: {remedy}")
    if free < 1.2 * need:
        return Finding(check, "warning", f"{sizes}, which is close: {remedy}")
    return Finding(check, "ok", sizes)


def check_shards(source: DataSource, fix: bool) -> Iterator[Finding]:
    """Compare every shard on this node with the checksums of its index; remove damaged ones that can be restored."""
    shards, size, is_sound = 0, 0, True
    for split in ("train", "validation"):
        for shard in source.shards(split):
            infos = [info for info in (shard["raw_data"], shard["zip_data"]) if info]
            files = {source.folder / split / info["basename"]: info for info in infos}
            present = {file: info for file, info in files.items() if file.is_file()}
            intact = [file for file, info in present.items() if is_intact(file, info["bytes"], info["hashes"])]
            shards, size = shards + bool(present), size + sum(info["bytes"] for info in present.values())
            origin = source.remote or next((str(file) for file in intact if file.suffix != ".mds"), None)
            for file in (file for file in present if file not in intact):
                is_sound = False
                yield _damaged_shard(file, origin, fix)
            if not present and not source.remote:
                is_sound = False
                sentence = f"{next(iter(files))} is missing: copy it again from its origin"
                yield Finding("shards", "problem", sentence)
    if is_sound:
        sentence = f"{shards} shards in {source.folder} match the checksums of index.json, {size / MIB:,.1f} MiB read"
        yield Finding("shards", "ok", sentence)


def _damaged_shard(file: Path, origin: str | None, fix: bool) -> Finding:
    """Remove a damaged shard with `fix`, if a run can restore it from `origin`."""
    if origin is None:
        remedy = "copy it again from its origin, or prepare the data again with --force"
        return Finding("shards", "problem", f"{file} is damaged: {remedy}")
    if fix:
        file.unlink(missing_ok=True)
        return Finding("shards", "ok", f"removed {file}, which was damaged; a run restores it from {origin}")
    sentence = f"{file} is damaged: a run restores it from {origin}, and --fix removes it"
    return Finding("shards", "warning", sentence)


def check_unfinished(source: DataSource, fix: bool) -> Iterator[Finding]:
    """Yield how many files that a killed process was writing are left; remove them with `fix`."""
    files = [*source.folder.rglob(f"*{UNFINISHED}*"), *source.folder.rglob("*.mds.tmp")]
    old = [file for file in files if time.time() - file.stat().st_mtime > ABANDONED]
    if old and fix:
        for file in old:
            file.unlink(missing_ok=True)
        yield Finding("leftovers", "ok", f"removed {len(old)} unfinished files of killed runs in {source.folder}")
    elif old:
        what = f"{len(old)} unfinished files of killed runs in {source.folder}, such as {old[0].name}"
        yield Finding("leftovers", "warning", f"{what}: --fix removes them")
