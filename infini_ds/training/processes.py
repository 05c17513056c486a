"""Which process of the run this is, however it was started: `deepspeed`, `torchrun`, `srun`, or plain `python`."""

import os
import re
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch

# What srun sets -> what torch, DeepSpeed and streaming read. DeepSpeed's own Slurm launcher does not map the ranks.
FROM_SLURM = {"SLURM_PROCID": "RANK", "SLURM_LOCALID": "LOCAL_RANK", "SLURM_STEP_NUM_TASKS": "WORLD_SIZE"}


SECONDS_FOR_FIRST_RANK = 5.0  # that other ranks wait before they say what is wrong
SECONDS_FOR_ROLL_CALL = 3.0


@dataclass(frozen=True)
class Process:
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def identify() -> Process:
    """Read this process's place from the environment and complete the environment for the libraries that read it.

    Raises:
        ValueError: several Slurm tasks, but no MASTER_ADDR.
    """
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        for theirs, ours in FROM_SLURM.items():
            env[ours] = env[theirs]
        env["LOCAL_WORLD_SIZE"] = env["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0]
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if int(env["WORLD_SIZE"]) > 1 and missing:
            raise ValueError(
                f"{missing[0]} is not set: in the job script, export MASTER_ADDR=$(scontrol show hostnames "
                '"$SLURM_JOB_NODELIST" | head -n 1) and MASTER_PORT=29500 before srun'
            )
    env.setdefault("RANK", "0")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    # streaming reads LOCAL_WORLD_SIZE, which DeepSpeed calls LOCAL_SIZE; without it two ranks collide in shared memory.
    env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))
    env.setdefault("LOCAL_SIZE", env["LOCAL_WORLD_SIZE"])
    if env["WORLD_SIZE"] == "1":
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", free_port())
    process = Process(*(int(env[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
    if torch.cuda.is_available() and process.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"rank {process.local_rank} of this node sees {torch.cuda.device_count()} GPUs: start one rank a GPU, and "
            "let each see all of the node's (with Slurm --gres=gpu:N and not --gpus-per-task)"
        )
    return process


def share_threads(process: Process) -> None:
    """On the CPU, divide this node's cores among its ranks, unless Slurm has done so."""
    if process.device.type == "cpu":
        sharing = 1 if "SLURM_CPUS_PER_TASK" in os.environ else process.local_world_size
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // sharing))


def disconnect() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(main) -> None:
    """Run a script's `main()`; a ValueError is for the user: its sentence is printed, without a stack, exit code 2.

    What is wrong for all ranks is said once: when the first one ends with an error, a launcher ends the others. Any
    other exception of one rank of several ends it at once, with its stack or, if another rank is gone, its name.
    """
    try:
        main()
    except ValueError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank:
            time.sleep(SECONDS_FOR_FIRST_RANK)
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        give_up(error)


def give_up(error: Exception) -> NoReturn:
    """Say what is wrong on this rank, and end without waiting for threads and data workers that wait for others."""
    rank = os.environ["RANK"]
    if is_of_contact(error):
        missing = ", ".join(map(str, missing_ranks())) or "another one, which answers again"
        # Without gloo's place in its source, and its advice.
        reason = re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0].splitlines()[0]
        print(
            f"error on rank {rank}: lost contact to rank {missing} ({reason}): see what that rank printed last; the "
            "same command goes on from the last checkpoint",
            file=sys.stderr,
        )
    else:
        print(f"error on rank {rank}:\n{''.join(traceback.format_exception(error))}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def is_of_contact(error: Exception) -> bool:
    """Whether a collective operation failed, for another rank that is gone or too late."""
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)


def missing_ranks() -> list[int]:
    """The ranks that do not answer to a roll call; rank 0 if nobody can hold it."""
    env = os.environ
    patience = timedelta(seconds=SECONDS_FOR_ROLL_CALL)
    try:
        store = torch.distributed.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=patience)
        store.set(f"here/{env['RANK']}", "")
        time.sleep(SECONDS_FOR_ROLL_CALL)
        return [rank for rank in range(int(env["WORLD_SIZE"])) if not store.check([f"here/{rank}"])]
    except torch.distributed.DistError:
        return [0]
