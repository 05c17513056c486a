"""Rank, world size and device of this process, whether `deepspeed`, `torchrun`, `srun` or plain `python` started it."""

import os
import socket
from dataclasses import dataclass

import torch

from infini_ds.utils.errors import UserError

# What srun sets -> what torch, DeepSpeed and streaming read. DeepSpeed's own Slurm launcher does not map the ranks.
FROM_SLURM = {"SLURM_PROCID": "RANK", "SLURM_LOCALID": "LOCAL_RANK", "SLURM_STEP_NUM_TASKS": "WORLD_SIZE"}
# Set by a launcher or by `detect_environment`: what makes a process one of several ranks.
LAUNCHER_VARIABLES = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)


@dataclass(frozen=True)
class DistEnv:
    """The distributed environment: this process's rank among all ranks (`rank`) and on its node (`local_rank`)."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def free_port() -> str:
    """Return a TCP port that is free on this machine at this moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def detect_environment() -> DistEnv:
    """Read rank and world size from the environment, and set the variables that torch, DeepSpeed and streaming read.

    Raises:
        UserError: the address of rank 0 is not set under Slurm, or this node has fewer GPUs than ranks.
    """
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        for theirs, ours in FROM_SLURM.items():
            env[ours] = env[theirs]
        # Such as "8(x4)" or "8,4". Every node has to have the same number of tasks.
        env["LOCAL_WORLD_SIZE"] = env["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0]
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if int(env["WORLD_SIZE"]) > 1 and missing:
            raise UserError(
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
    environment = DistEnv(*(int(env[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
    if torch.cuda.is_available() and environment.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {environment.local_rank} of this node sees {torch.cuda.device_count()} GPUs: start one rank for "
            "each GPU, and let each see all of the node's (with Slurm --gres=gpu:N and not --gpus-per-task)"
        )
    return environment


def set_cpu_threads(environment: DistEnv) -> None:
    """On the CPU, divide this node's cores among its ranks, unless Slurm has done so."""
    if environment.device.type == "cpu":
        ranks = 1 if "SLURM_CPUS_PER_TASK" in os.environ else environment.local_world_size
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def shutdown() -> None:
    """Destroy the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
