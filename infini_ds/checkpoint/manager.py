"""Checkpoint manager: writes, verifies, prunes and loads a run's checkpoints, by all of its ranks.

A checkpoint is a folder `step-000100` with all that the next step needs. It is valid once its manifest is written, as
the last of its files. So a crash at any time leaves the previous one valid. Incomplete and damaged ones are skipped.
"""

import logging
import shutil
from collections.abc import Iterable
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from infini_ds.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    TrainState,
    complete_checkpoints,
    find_damage,
    fsync_and_hash,
    incomplete_checkpoints,
    read_manifest,
    write_manifest,
)
from infini_ds.checkpoint.universal import universal_checkpoint
from infini_ds.config.recipe import CheckpointSection
from infini_ds.distributed import collectives
from infini_ds.distributed.entry_point import is_communication_error
from infini_ds.distributed.parallel_dims import ParallelDims
from infini_ds.utils.atomic import fsync_dir
from infini_ds.utils.errors import UserError
from infini_ds.utils.rng import get_rng_states, seed_everything, set_rng_states

logger = logging.getLogger(__name__)


class CheckpointEngine(Protocol):
    """What the manager needs of the training engine. Its methods are collective."""

    @property
    def module(self) -> PreTrainedModel: ...

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Write weights, optimizer and schedule, and `client_state` with them, into `folder`."""

    def load(self, folder: Path) -> dict[str, Any]:
        """Load what as many ranks saved, and return its client state."""
        ...

    def load_universal(self, folder: Path) -> dict[str, Any]:
        """Load a universal checkpoint, and return its client state."""
        ...


def save(
    engine: CheckpointEngine,
    run: Path,
    state: TrainState,
    data_state: dict[str, Any],
    keep: CheckpointSection,
    dims: ParallelDims,
) -> Path:
    """Write the checkpoint of `state.step`, then remove those that `keep` does not keep. Returns its folder.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    if dims.rank == 0 and folder.exists():
        remove(folder)  # half written by a run that was killed, or damaged
    dist.barrier()
    try:
        engine.save(folder, {"data": data_state})
        torch.save(get_rng_states(), folder / f"random-states-{dims.rank}.pt")
        if dims.rank == 0:
            engine.module.config.save_pretrained(folder)
        digests = collectives.all_gather_object(
            {file.name: fsync_and_hash(file) for file in _files_of_rank(dims.rank, folder)}
        )
        if dims.rank == 0:
            files = {name: digest for of_rank in digests for name, digest in of_rank.items()}
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            write_manifest(
                folder, CheckpointManifest(state, dims.world_size, now, torch.__version__, files, dims.sequence)
            )
    except (OSError, RuntimeError) as error:
        if is_communication_error(error) or not _is_write_error(error):
            raise
        free = shutil.disk_usage(run).free / 2**20
        raise UserError(
            f"the checkpoint of step {state.step} could not be written to {folder}, where {free:,.0f} MiB are free: "
            "free some space, or copy the run to another output=; the same command resumes from the previous "
            f"checkpoint ({error})"
        ) from error
    if dims.rank == 0:
        prune(run, state.step, keep)
    dist.barrier()
    return folder


def _is_write_error(error: OSError | RuntimeError) -> bool:
    """Return whether a file could not be written: torch.save raises RuntimeError for that, from its zip writer."""
    return isinstance(error, OSError) or "inline_container" in str(error)


def _files_of_rank(rank: int, folder: Path) -> list[Path]:
    """Return the files that a rank wrote: its shard of the optimizer, its random states, and on rank 0 all others."""
    patterns = [f"*zero_pp_rank_{rank}_mp_rank_*", f"random-states-{rank}.pt"]
    if rank == 0:
        patterns += ["mp_rank_*", "config.json"]
    return [file for pattern in patterns for file in folder.glob(pattern)]


def remove(folder: Path) -> None:
    """Delete the manifest first, so that a half-removed folder never looks valid, then the folder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    fsync_dir(folder)
    shutil.rmtree(folder, ignore_errors=True)  # what a file system refuses to delete goes with the next removal


def prune(run: Path, step: int, keep: CheckpointSection) -> None:
    """Remove the checkpoints that `keep` does not keep, now that the one of `step` is complete.

    Also removes incomplete ones, and those of later steps, which a run leaves when it rolls back.
    """
    manifests = {}
    for folder in complete_checkpoints(run):
        try:
            manifests[folder] = read_manifest(folder)
        except UserError:
            continue  # damaged
    kept = steps_to_keep((manifest for manifest in manifests.values() if manifest.state.step <= step), keep)
    stay = {folder for folder, manifest in manifests.items() if manifest.state.step in kept}
    for folder in set((run / "checkpoints").glob("step-*")) - stay:
        remove(folder)


def steps_to_keep(manifests: Iterable[CheckpointManifest], keep: CheckpointSection) -> set[int]:
    """Return the steps whose checkpoints are kept.

    These are the last `keep_last`, those that `keep_every` divides, with `keep_best` the one of the lowest validation
    loss, and the last one without consecutive skips, which a rollback needs.
    """
    ordered = sorted(manifests, key=lambda manifest: manifest.state.step)
    kept = {manifest.state.step for manifest in ordered[-keep.keep_last :]}
    if keep.keep_every:
        kept |= {manifest.state.step for manifest in ordered if manifest.state.step % keep.keep_every == 0}
    healthy = [manifest.state.step for manifest in ordered if not manifest.state.consecutive_skips]
    kept |= set(healthy[-1:])
    losses = {
        manifest.state.step: manifest.validation_loss
        for manifest in ordered
        if manifest.validation_loss is not None and isfinite(manifest.validation_loss)
    }
    if keep.keep_best and losses:
        kept.add(min(losses, key=lambda step: losses[step]))
    return kept


def newest_intact(run: Path, healthy: bool = False) -> Path | None:
    """Return the newest checkpoint whose files are intact, the same on every rank; None if the run has none.

    Rank 0 lists the checkpoints, since a shared file system may show the other ranks fewer, and logs a warning for each
    that is skipped. Reading the files is split across ranks.

    Args:
        healthy: leave out checkpoints that were written amid consecutive skipped steps.
    Raises:
        UserError: the run has complete checkpoints, and all are damaged.
    """
    complete, incomplete = collectives.broadcast_from_rank_zero(
        lambda: (complete_checkpoints(run), incomplete_checkpoints(run))
    )
    if healthy:
        complete = collectives.broadcast_from_rank_zero(
            lambda: [checkpoint for checkpoint in complete if not _consecutive_skips(checkpoint)]
        )
    elif collectives.is_rank_zero():
        for folder in incomplete:
            logger.warning(f"skipping {folder}: it is incomplete (no {MANIFEST})")
    found: list[str] = []
    for checkpoint in reversed(complete):
        of_ranks = collectives.all_gather_object(find_damage(checkpoint, collectives.rank(), collectives.world_size()))
        found = list(dict.fromkeys(sentence for of_rank in of_ranks for sentence in of_rank))
        if not found:
            return checkpoint
        if collectives.is_rank_zero():
            logger.warning(f"skipping {checkpoint}: it is damaged: {'; '.join(found)}")
    if complete:
        raise UserError(
            f"all checkpoints of {run} are damaged, the oldest too ({found[0]}): restore one from a copy, or start "
            "from scratch with another name="
        )
    return None


def _consecutive_skips(checkpoint: Path) -> int:
    try:
        return read_manifest(checkpoint).state.consecutive_skips
    except UserError:
        return 0  # damaged, which is logged when its files are read


def load(engine: CheckpointEngine, checkpoint: Path, dims: ParallelDims) -> tuple[TrainState, dict[str, Any]]:
    """Load a checkpoint into the engine, at any time, and restore the random states.

    A checkpoint of another number of ranks is converted first. The random states belong to the arrangement of ranks
    that wrote them: in any other one each rank gets new ones, determined by its own seed and the step.

    Returns:
        The state of the run, and the state of the data.
    Raises:
        UserError: the conversion failed.
    """
    manifest = read_manifest(checkpoint)
    if manifest.world_size == dims.world_size:  # ZeRO shards across all ranks, whatever they are used for
        client_state = engine.load(checkpoint)
    else:
        with universal_checkpoint(checkpoint) as folder:
            client_state = engine.load_universal(folder)
    if (manifest.world_size, manifest.sequence) == (dims.world_size, dims.sequence):
        set_rng_states(torch.load(checkpoint / f"random-states-{dims.rank}.pt", weights_only=False))
    else:
        seed_everything(torch.initial_seed() + manifest.state.step)
    return manifest.state, client_state["data"]
