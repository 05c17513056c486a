"""The door to DeepSpeed: processes are connected and the engine is built here."""

import logging
import os
import warnings
from datetime import timedelta

import torch
from torch import nn
from torch.distributed import distributed_c10d

from infini_ds.config.lr_schedule import factor, gate_factor
from infini_ds.config.recipe import OptimizerSection, Recipe
from infini_ds.distributed.environment import DistEnv
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.model.memory_rule import get_memory_rule
from infini_ds.utils.errors import UserError

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed


def connect(process: DistEnv, timeout_minutes: float) -> None:
    """Join the run's processes; before any streaming object is made, which waits for the others in its constructor.

    A collective operation fails once it has waited for another rank for `timeout_minutes`.

    Raises:
        UserError: the processes did not find each other.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's to mend
    for name in ("DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    # Otherwise DeepSpeed compiles a kernel for all-reduce in shared memory at the first start on a CPU: a minute, and
    # a compiler that the machine may lack, for what gloo does as well at the sizes that a CPU trains.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    limit = timedelta(minutes=timeout_minutes)
    # DeepSpeed makes groups of its own without a time limit, and torch takes these defaults for them.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    backend = "nccl" if process.device.type == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=limit, verbose=False)
    except RuntimeError as error:
        place = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {process.rank} could not join the {process.world_size} ranks at {place} within timeout_minutes="
            f"{timeout_minutes}: start every rank, and give an address of the first node that all reach, with a free "
            f"port ({str(error).strip().splitlines()[0]})"
        ) from error


def parameter_groups(model: InfiniGPTNeoForCausalLM, optimizer: OptimizerSection) -> list[dict]:
    """Matrices, the embeddings among them (the input embedding is the output layer's matrix too): weight decay.
    Biases and norms: none. Gates: none, and their own learning rate. A memory rule names the group of its parameters.
    """
    groups = {
        "decay": {"params": [], "lr": optimizer.learning_rate, "weight_decay": optimizer.weight_decay},
        "no_decay": {"params": [], "lr": optimizer.learning_rate, "weight_decay": 0.0},
        "gates": {"params": [], "lr": optimizer.gate_learning_rate, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        kind = "gates" if name.endswith(".beta") else "decay" if parameter.dim() >= 2 else "no_decay"
        if ".memory_parameters." in name:
            kind = get_memory_rule(model.config.memory_rule).optimizer_group
        groups[kind]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items()]


def step(engine, skip: bool = False) -> None:
    """DeepSpeed's step behind a backward pass: the optimizer's, if that was the last of the batch.

    With `skip`, on all ranks, weights, moments and schedule stay as they are. DeepSpeed decides that by the norm of the
    gradient, which it sums up over the ranks: one number that is none in the smallest parameter is enough.
    """
    if skip:
        smallest = min(engine.module.parameters(), key=torch.numel)
        if getattr(smallest, "_hp_grad", None) is not None:  # bf16 with stage 1, whose gradient the next line misses
            smallest._hp_grad.fill_(torch.nan)
        else:
            deepspeed.utils.safe_set_full_grad(smallest, torch.full_like(smallest, torch.nan, dtype=torch.float32))
    engine.step()


def full_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """What the ranks have summed up, whole, between the last backward pass of a batch and the step; asked by all."""
    return deepspeed.utils.safe_get_full_grad(parameter)


def build_engine(model: nn.Module, recipe: Recipe, config: dict):
    """The DeepSpeed engine, with AdamW over the three parameter groups and the recipe's schedule."""
    choice = recipe.optimizer
    groups = parameter_groups(model, choice)
    settings = {"lr": choice.learning_rate, "betas": (choice.beta1, choice.beta2), "eps": choice.eps}
    offload = (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(groups, **settings, adamw_mode=True)
    else:
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    of_step = [lambda step: factor(recipe.schedule, recipe.steps, step)] * 2
    of_step.append(lambda step: gate_factor(recipe.schedule, recipe.steps, step))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, of_step)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    # For fp32 DeepSpeed asks the norm alone. With the optimizer on the CPU it takes that before `step` can spoil it.
    engine.optimizer.check_grad_overflow = True
    return engine
