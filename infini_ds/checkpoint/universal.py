"""Universal checkpoints: DeepSpeed's format that any number of ranks can load.

It holds each parameter's weight and optimizer state unsharded, of which a rank loads its shard.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from infini_ds.distributed import collectives
from infini_ds.utils.errors import UserError

SECONDS = 2.0  # between two looks whether the conversion has ended


@contextlib.contextmanager
def universal_checkpoint(checkpoint: Path) -> Iterator[Path]:
    """Convert a checkpoint to the universal format, in a scratch folder beside it that is removed after the block.

    Rank 0 converts, in a process of its own. The scratch folder takes about twice the space of the checkpoint.
    Collective: every rank enters and leaves the block.

    Raises:
        UserError: the conversion failed.
    """
    scratch = checkpoint.with_name(checkpoint.name + ".universal")
    converted, log = scratch / checkpoint.name, scratch / "log.txt"
    process = None
    try:
        if collectives.is_rank_zero():
            shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
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
            lines = log.read_text().split("\n") if process else ["see rank 0"]
            reason = next((line for line in reversed(lines) if line.strip()), "without a message")
            raise UserError(
                f"{checkpoint} could not be converted for {collectives.world_size()} ranks, with "
                f"{shutil.disk_usage(checkpoint).free / 2**20:,.0f} MiB free ({reason}): free some space, or start as "
                "many ranks as wrote it"
            )
        yield converted
        dist.barrier()  # rank 0 removes the folder once all ranks have loaded it
    finally:
        if process:
            process.kill()
            process.wait()
            shutil.rmtree(scratch, ignore_errors=True)


def _wait(process: "subprocess.Popen[bytes] | None") -> int:
    """Wait for rank 0's process and return its exit code on every rank.

    By many short collectives, since a single one would time out during a long conversion.
    """
    while True:
        code = None
        if process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(SECONDS)
        code = collectives.broadcast_object(code)
        if code is not None:
            return code
