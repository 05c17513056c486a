"""A checkpoint for another number of ranks, by DeepSpeed's universal format: each parameter's weight and optimizer
state as a whole, of which a rank takes its part.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from infini_ds.utils.errors import UserError

SECONDS = 2.0  # between two looks at the conversion


@contextlib.contextmanager
def universal(checkpoint: Path) -> Iterator[Path]:
    """The checkpoint in universal format, in a scratch folder beside it that lasts for the `with` block.

    The first rank converts, in a process of its own; the scratch folder takes about twice the room of the checkpoint.

    Raises:
        UserError: the conversion failed.
    """
    scratch = checkpoint.with_name(checkpoint.name + ".universal")
    converted, log = scratch / checkpoint.name, scratch / "log.txt"
    process = None
    try:
        if dist.get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
            scratch.mkdir()
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            folders = ["--input_folder", str(checkpoint), "--output_folder", str(converted)]
            with log.open("w") as opened:
                process = subprocess.Popen(
                    command + folders,
                    stdout=opened,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"DS_ACCELERATOR": "cpu"},
                )
        if _wait(process):
            reason = log.read_text().strip().splitlines()[-1] if process else "see the first rank"
            raise UserError(
                f"{checkpoint} could not be converted for {dist.get_world_size()} ranks, with "
                f"{shutil.disk_usage(checkpoint).free / 2**20:,.0f} MiB free ({reason}): make room, or start as many "
                "ranks as wrote it"
            )
        yield converted
        dist.barrier()  # all have read it
    finally:
        if process:
            process.kill()
            process.wait()
            shutil.rmtree(scratch, ignore_errors=True)


def _wait(process: subprocess.Popen | None) -> int:
    """The exit code of the first rank's process, on every rank.

    In many short collective calls: a single one would run into their time limit.
    """
    while True:
        code = [None]
        if process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code[0] = process.wait(SECONDS)
        dist.broadcast_object_list(code)
        if code[0] is not None:
            return code[0]


def load_universal(engine, folder: Path) -> dict:
    """Put the engine back from the universal format; returns the client state."""
    with _stand_ins(engine.optimizer):
        engine._config.load_universal_checkpoint = True  # `checkpoint.load_universal`, for this call alone
        try:
            return engine.load_checkpoint(str(folder.parent), tag=folder.name)[1]
        finally:
            engine._config.load_universal_checkpoint = False


@contextlib.contextmanager
def _stand_ins(optimizer) -> Iterator[None]:
    """DeepSpeed 0.19.8 reads a group's step from the first parameter that this rank holds, and fails (IndexError) if
    it holds padding alone: gates are few numbers, so with many ranks some hold none.
    """
    empty = [group for group in optimizer.bit16_groups if all(lp._hp_mapping is None for lp in group)]
    for group in empty:
        nothing = torch.empty(0)
        nothing._hp_mapping = SimpleNamespace(get_optim_state_keys=list)
        nothing.load_hp_checkpoint_state = lambda *_, **__: None
        optimizer.param_names[nothing] = ""
        group.append(nothing)
    try:
        yield
    finally:
        for group in empty:
            del optimizer.param_names[group.pop()]
