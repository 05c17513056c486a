"""Checkpoints of a run: folders `step-000100` with all that the next step needs, written and read by all its ranks.

A checkpoint is good once its mark stands, which is written last (`marks`). So a crash at any instant leaves the last
good one; what is half written is passed over, and so is what has changed on the disk since.
"""

import shutil
from collections.abc import Iterable
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path

import torch
import torch.distributed as dist

from infini_ds.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    TrainState,
    complete_checkpoints,
    find_damage,
    fsync_and_hash,
    fsync_dir,
    incomplete_checkpoints,
    read_manifest,
    write_manifest,
)
from infini_ds.checkpoint.universal import load_universal, universal
from infini_ds.config.recipe import CheckpointSection
from infini_ds.distributed.entry_point import is_communication_error
from infini_ds.utils.errors import UserError
from infini_ds.utils.rng import get_rng_states, seed_everything, set_rng_states


def save(engine, run: Path, state: TrainState, data_state: dict, keep: CheckpointSection) -> Path:
    """Write the checkpoint of `state.step`, by all ranks together, then remove those that `keep` does not name.

    Raises:
        UserError: it could not be written, for want of room or rights.
    """
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0 and folder.exists():
        remove(folder)  # half written by a run that was killed, or damaged
    dist.barrier()
    try:
        engine.save_checkpoint(
            str(folder.parent), tag=folder.name, client_state={"data": data_state}, save_latest=False
        )
        torch.save(get_rng_states(), folder / f"random-states-{rank}.pt")
        if rank == 0:
            engine.module.config.save_pretrained(folder)
        sums = [None] * world_size
        dist.all_gather_object(sums, {file.name: fsync_and_hash(file) for file in _files_of(rank, folder)})
        if rank == 0:
            files = {name: file for of_rank in sums for name, file in of_rank.items()}
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            write_manifest(folder, CheckpointManifest(state, world_size, now, torch.__version__, files))
    except (OSError, RuntimeError) as error:  # torch.save on a full disk raises RuntimeError
        if is_communication_error(error):
            raise
        free = shutil.disk_usage(run).free / 2**20
        raise UserError(
            f"the checkpoint of step {state.step} could not be written to {folder}, where {free:,.0f} MiB are free: "
            f"make room, or give another output=; the same command goes on from the checkpoint before ({error})"
        ) from error
    if rank == 0:
        remove_surplus(run, state.step, keep)
    dist.barrier()
    return folder


def _files_of(rank: int, folder: Path) -> list[Path]:
    """What this rank wrote: its part of the optimizer, its random states; the first one all else."""
    patterns = [f"*zero_pp_rank_{rank}_mp_rank_*", f"random-states-{rank}.pt"]
    if rank == 0:
        patterns += ["mp_rank_*", "config.json"]
    return [file for pattern in patterns for file in folder.glob(pattern)]


def remove(folder: Path) -> None:
    """Take the mark off first, so that what is left of the folder is never taken for a checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    fsync_dir(folder)
    shutil.rmtree(folder, ignore_errors=True)  # what a file system holds back goes with the next removal


def remove_surplus(run: Path, step: int, keep: CheckpointSection) -> None:
    """Remove what is not to be kept, now that the checkpoint of `step` stands: also unfinished ones, and those of later
    steps, which a run leaves behind that has gone back.
    """
    marks = {}
    for folder in complete_checkpoints(run):
        try:
            marks[folder] = read_manifest(folder)
        except UserError:
            continue  # damaged
    kept = steps_to_keep((mark for mark in marks.values() if mark.state.step <= step), keep)
    whole = {folder for folder, mark in marks.items() if mark.state.step in kept}
    for folder in set((run / "checkpoints").glob("step-*")) - whole:
        remove(folder)


def steps_to_keep(marks: Iterable[CheckpointManifest], keep: CheckpointSection) -> set[int]:
    """The last `keep_last`, those whose step `keep_every` divides, the one of the lowest validation loss, and the last
    that a run in trouble can go back to.
    """
    marks = sorted(marks, key=lambda mark: mark.state.step)
    kept = {mark.state.step for mark in marks[-keep.keep_last :]}
    if keep.keep_every:
        kept |= {mark.state.step for mark in marks if mark.state.step % keep.keep_every == 0}
    kept |= {mark.state.step for mark in [mark for mark in marks if not mark.state.consecutive_skips][-1:]}
    judged = [mark for mark in marks if mark.validation_loss is not None and isfinite(mark.validation_loss)]
    if keep.keep_best and judged:
        kept.add(min(judged, key=lambda mark: mark.validation_loss).state.step)
    return kept


def newest_intact(run: Path, healthy: bool = False) -> Path | None:
    """The newest checkpoint whose files are as they were written, the same on every rank; None if the run has none.
    With `healthy` the newest of those that were not written in a row of skipped steps.

    The first rank says which there are, since a shared file system may show the others less. The files are shared out
    for reading. The first rank prints a sentence for each checkpoint that is passed over.

    Raises:
        UserError: there are finished checkpoints, and all are damaged.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def say(sentence: str) -> None:
        if rank == 0:
            print(sentence, flush=True)

    listed = [(complete_checkpoints(run), incomplete_checkpoints(run))]
    if healthy:
        listed = [([checkpoint for checkpoint in listed[0][0] if not _skipped_steps(checkpoint)], [])]
    dist.broadcast_object_list(listed)
    good, unfinished = listed[0]
    for folder in unfinished:
        say(f"{folder} is passed over: it is not finished (no {MANIFEST})")
    for checkpoint in reversed(good):
        seen = [None] * world_size
        dist.all_gather_object(seen, find_damage(checkpoint, rank, world_size))
        found = dict.fromkeys(sentence for of_rank in seen for sentence in of_rank)
        if not found:
            return checkpoint
        say(f"{checkpoint} is passed over, it is damaged: {'; '.join(found)}")
    if good:
        raise UserError(
            f"all checkpoints of {run} are damaged, the oldest too ({next(iter(found))}): bring one back from a copy, "
            "or begin anew with another name="
        )
    return None


def _skipped_steps(checkpoint: Path) -> int:
    try:
        return read_manifest(checkpoint).state.consecutive_skips
    except UserError:
        return 0  # damaged, which is said where its files are read


def load(engine, checkpoint: Path) -> tuple[TrainState, dict]:
    """Put the engine and the random states back, at any time; returns where the run stood and the state of the data.

    A checkpoint of another number of ranks is converted on the way. Its random states belong to other ranks: each rank
    then gets new ones, that its own seed and the step determine.

    Raises:
        UserError: the conversion failed.
    """
    mark = read_manifest(checkpoint)
    if mark.world_size == dist.get_world_size():
        _, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        states = torch.load(checkpoint / f"random-states-{dist.get_rank()}.pt", weights_only=False)
        set_rng_states(states)
    else:
        with universal(checkpoint) as folder:
            client_state = load_universal(engine, folder)
        seed_everything(torch.initial_seed() + mark.state.step)
    # DeepSpeed restores the learning rates too: those of the schedule that was, if the recipe's has changed.
    schedule = engine.lr_scheduler
    for group, peak, of_step in zip(engine.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = peak * of_step(schedule.last_epoch)
    return mark.state, client_state["data"]
