"""Checkpoints of a run: folders `step-000100` with all that the next step needs, the newest good one, the last N kept.

A checkpoint is good once its `checkpoint.json` stands, which is written last; one half written at a crash has none.
"""

import json
import os
import random
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

MARK = "checkpoint.json"


@dataclass
class TrainState:
    """Where the run stands."""

    step: int = 0
    tokens: int = 0
    validated: int = -1  # the step of the last validation


def good_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*/" + MARK)
    return sorted((mark.parent for mark in found), key=lambda folder: int(re.search(r"\d+$", folder.name).group()))


def read_mark(checkpoint: Path) -> dict:
    return json.loads((checkpoint / MARK).read_text())


def save(engine, run: Path, state: TrainState, data_state: dict, keep_last: int) -> Path:
    """Write the checkpoint of `state.step`, by all ranks together, and remove all but the last `keep_last`.

    Raises:
        ValueError: it could not be written, for want of room or rights.
    """
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    rank = dist.get_rank()
    if rank == 0 and folder.exists():
        shutil.rmtree(folder)  # half written by a run that was killed
    dist.barrier()
    try:
        engine.save_checkpoint(
            str(folder.parent), tag=folder.name, client_state={"data": data_state}, save_latest=False
        )
        torch.save(_random_states(), folder / f"random-states-{rank}.pt")
    except (OSError, RuntimeError) as error:  # torch.save on a full disk raises RuntimeError
        free = shutil.disk_usage(run).free / 2**20
        raise ValueError(
            f"the checkpoint of step {state.step} could not be written to {folder}, where {free:,.0f} MiB are free: "
            f"make room, or give another output=; the same command goes on from the checkpoint before ({error})"
        ) from error
    dist.barrier()
    if rank == 0:
        engine.module.config.save_pretrained(folder)
        mark = asdict(state) | {"world_size": dist.get_world_size(), "torch": torch.__version__}
        partial = folder / (MARK + ".partial")
        partial.write_text(json.dumps(mark, indent=1))
        os.replace(partial, folder / MARK)
        kept = good_checkpoints(run)[-keep_last:]
        for old in set(folder.parent.glob("step-*")) - set(kept):
            (old / MARK).unlink(missing_ok=True)  # no good checkpoint any more, however far the removal gets
            shutil.rmtree(old)
    dist.barrier()
    return folder


def read_state(checkpoint: Path) -> TrainState:
    mark = read_mark(checkpoint)
    return TrainState(mark["step"], mark["tokens"], mark.get("validated", mark["step"]))


def load(engine, checkpoint: Path) -> dict:
    """Put the engine and the random states back; returns the state of the data."""
    _, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    states = torch.load(checkpoint / f"random-states-{dist.get_rank()}.pt", weights_only=False)
    _restore_random_states(states)
    # DeepSpeed restores the learning rates too: those of the schedule that was, if the recipe's has changed.
    schedule = engine.lr_scheduler
    for group, peak, of_step in zip(engine.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = peak * of_step(schedule.last_epoch)
    return client_state["data"]


def check_ranks(checkpoint: Path, world_size: int) -> None:
    """Raise a ValueError if the checkpoint was written by another number of ranks."""
    theirs = read_mark(checkpoint)["world_size"]
    if theirs != world_size:
        raise ValueError(
            f"{checkpoint} was written by {theirs} ranks and this run has {world_size}: start {theirs} ranks, or begin "
            "a new run with name= and model.start_from= an export of it"
        )


def _random_states() -> dict:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
