"""DeepSpeed's engine. No other file of training knows DeepSpeed's names."""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from infini_ds.config.lr_schedule import factor, gate_factor
from infini_ds.config.recipe import Recipe
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.model.modeling import InfiniCausalLMOutput
from infini_ds.training.optimizer_groups import parameter_groups
from infini_ds.utils.errors import UserError
from infini_ds.utils.paths import check_can_compile_cpp

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # raised by DeepSpeed's calls
# Otherwise DeepSpeed compiles a kernel for all-reduce in shared memory at the first start on a CPU: a minute, and a
# compiler that the machine may lack, for what gloo does as well at the sizes that a CPU trains.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine:
    """DeepSpeed's engine: ZeRO, AdamW or Muon over the parameter groups, the recipe's schedule, and checkpoints.

    A step is one forward and backward pass for each micro-batch, then `step`. All methods but the forward pass and
    `learning_rates` are collective: every rank calls them in the same order.
    """

    def __init__(self, model: InfiniGPTNeoForCausalLM, recipe: Recipe, config: dict[str, Any]):
        """`config` is DeepSpeed's JSON with each "auto" filled in, as `deepspeed_config` returns it."""
        choice = recipe.optimizer
        groups = parameter_groups(model, choice)
        betas = (choice.beta1, choice.beta2)
        settings: dict[str, Any] = {"lr": choice.learning_rate, "betas": betas, "eps": choice.eps}
        zero = config["zero_optimization"]
        offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        if choice.kind == "muon":
            if offloads or zero["stage"] != 2:
                raise UserError(
                    f"optimizer.kind=muon with deepspeed={recipe.deepspeed}: this project runs Muon with ZeRO stage 2 "
                    "and without offload_optimizer; give another JSON file, or optimizer.kind=adamw"
                )
            optimizer: torch.optim.Optimizer = _muon(groups, choice.muon_momentum, settings)
        elif offloads:
            check_can_compile_cpp(f"deepspeed={recipe.deepspeed} with offload_optimizer")
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer = DeepSpeedCPUAdam(groups, **settings, adamw_mode=True)
        else:
            optimizer = torch.optim.AdamW(groups, **settings, fused=True)
        self._group_names = [group["name"] for group in groups]
        factors = {name: lambda step: factor(recipe.schedule, recipe.steps, step) for name in self._group_names}
        factors["gates"] = lambda step: gate_factor(recipe.schedule, recipe.steps, step)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, list(factors.values()))
        try:
            made = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
        except ValidationError as error:  # a value of the JSON that is of another type than DeepSpeed declares
            wrong = error.errors()[0]
            given = f"{'.'.join(map(str, wrong['loc']))}={json.dumps(wrong['input'], default=str)}"
            raise UserError(
                f"deepspeed={recipe.deepspeed}: {given} is refused by DeepSpeed ({wrong['msg']}): correct it there"
            ) from error
        self._engine = made[0]
        # By default DeepSpeed rejects an fp32 step by the gradient's norm alone. With the optimizer on the CPU it takes
        # that norm in the backward pass, before `step(skip=True)` changes the gradient; this check comes after.
        self._engine.optimizer.check_grad_overflow = True
        # DeepSpeed puts zero_to_fp32.py into each checkpoint. Called as its header says, it fails: it looks for a file
        # `latest`, which these checkpoints do without.
        self._engine._copy_recovery_script = lambda save_path: None

    @property
    def module(self) -> InfiniGPTNeoForCausalLM:
        return self._engine.module

    def __call__(self, **micro_batch: Any) -> InfiniCausalLMOutput:
        """Run the forward pass."""
        return self._engine(**micro_batch)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's loss; the last micro-batch of a step reduces it across ranks.

        A non-finite loss makes the gradient NaN, so that all ranks skip the step. The factor stays on the device: the
        host does not wait, and a finite loss and its gradient are unchanged to the bit.
        """
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch

    def step(self, skip: bool = False) -> None:
        """Clip the gradient and run the optimizer and the schedule, unless the gradient is non-finite or `skip` is set.

        A skipped step leaves weights, moments and schedule as they are. DeepSpeed decides by the gradient's norm, which
        it sums over the ranks: a single NaN in the smallest parameter's gradient is enough.
        """
        if skip:
            smallest = min(self.module.parameters(), key=torch.numel)
            high_precision = getattr(smallest, "_hp_grad", None)
            if high_precision is not None:  # bf16 with stage 1, where the lines below have no effect
                high_precision.fill_(torch.nan)
            else:
                value = torch.full_like(smallest, torch.nan, dtype=torch.float32)
                deepspeed.utils.safe_set_full_grad(smallest, value)
        self._engine.step()

    def set_batch(self, config: dict[str, Any]) -> None:
        """Between two steps, take over from DeepSpeed's JSON how many rows a step has and how they are divided."""
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            setattr(self._engine._config, key, config[key])
        self._engine.optimizer.gradient_accumulation_steps = config["gradient_accumulation_steps"]
        self._engine.micro_steps = 0  # which DeepSpeed counts from the start of the run on, to find the last of a step

    @property
    def step_was_applied(self) -> bool:
        """Whether the last step changed the weights."""
        return self._engine.was_step_applied()

    @property
    def skipped_steps(self) -> int:
        return self._engine.skipped_steps

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of the next step, by the name of the parameter group."""
        return dict(zip(self._group_names, self._engine.get_lr(), strict=True))

    def gradient_norm(self) -> float:
        """Return the norm of the last step's gradient before clipping; infinity if it was non-finite.

        With Muon, which DeepSpeed runs before it takes the norm, the matrices' steps are in place of their gradients.
        """
        return float(self._engine.get_global_grad_norm())

    def full_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return the gradient summed over the ranks, between the last backward pass of a step and `step`."""
        return deepspeed.utils.safe_get_full_grad(parameter)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type that DeepSpeed's "torch_autocast" computes in. None without it."""
        return self._engine.torch_autocast_dtype() if self._engine.torch_autocast_enabled() else None

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Write weights, optimizer and schedule, and `client_state` with them, into `folder`."""
        with _momentum_in_shards(self._engine.optimizer):
            self._engine.save_checkpoint(
                str(folder.parent), tag=folder.name, client_state=client_state, save_latest=False
            )

    def load(self, folder: Path) -> dict[str, Any]:
        """Load what `save` wrote, by as many ranks as wrote it; returns the client state."""
        _, client_state = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        _gather_momentum(self._engine.optimizer)
        self._apply_schedule()
        return client_state

    def load_universal(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint in DeepSpeed's universal format, by any number of ranks; returns the client state."""
        with _padding_only_groups(self._engine.optimizer):
            self._engine._config.load_universal_checkpoint = True  # `checkpoint.load_universal`, for this call alone
            try:
                return self.load(folder)
            finally:
                self._engine._config.load_universal_checkpoint = False

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks from the model, which keep the engine's buffers alive."""
        self._engine.destroy()

    def _apply_schedule(self) -> None:
        """Set the learning rates of this recipe's schedule, which may differ from the checkpoint's."""
        schedule = self._engine.lr_scheduler
        groups = self._engine.optimizer.param_groups
        for group, peak, factor_of_step in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = peak * factor_of_step(schedule.last_epoch)


def _muon(groups: list[dict[str, Any]], momentum: float, adam: dict[str, Any]) -> torch.optim.Optimizer:
    """Return DeepSpeed's Muon for the group "muon", with AdamW of the settings `adam` for the other groups."""
    from deepspeed.runtime.zero.muon import original_muon

    if not torch.cuda.is_available():
        # DeepSpeed compiles Muon with torch.compile, for which a machine needs a C++ compiler. A step on the CPU is as
        # fast without it.
        for name in ("muon_update", "zeropower_via_gram_newtonschulz", "zeropower_via_newtonschulz5"):
            compiled = getattr(original_muon, name)
            setattr(original_muon, name, getattr(compiled, "_torchdynamo_orig_callable", compiled))
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        group["use_muon"] = group["name"] == "muon"
        group.update({"momentum": momentum} if group["use_muon"] else {"betas": adam["betas"], "eps": adam["eps"]})
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    return MuonWithAuxAdam(groups, torch.optim.AdamW, adam | {"fused": True})


def _muon_groups(optimizer: Any) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Yield of each group that Muon trains: its number, this rank's shard of its weights, and the optimizer's state."""
    for number, group in enumerate(optimizer.optimizer.param_groups):
        if group.get("use_muon"):
            (shard,) = group["params"]
            yield number, shard, optimizer.optimizer.state[shard]


@contextmanager
def _momentum_in_shards(optimizer: Any) -> Iterator[None]:
    """While the block runs, the state of Muon looks like that of Adam, which is sharded across the ranks.

    Muon needs complete matrices, so a rank keeps the momentum of each matrix of which its shard holds a part. DeepSpeed
    saves that as it is, and its universal format (0.19.8) has place for the two moments of Adam alone.
    """
    kept = {}
    for number, shard, state in _muon_groups(optimizer):
        kept[number] = dict(state)
        part = torch.zeros_like(shard)
        momentum = state.get("momentum_buffer", part[:0])
        held = momentum[optimizer.first_offset[number] :][: part.numel()]
        part[: held.numel()] = held
        state.clear()
        state.update({"exp_avg": part, "exp_avg_sq": part.new_zeros(1).expand_as(part)})
    try:
        yield
    finally:
        for number, _, state in _muon_groups(optimizer):
            state.clear()
            state.update(kept[number])


def _gather_momentum(optimizer: Any) -> None:
    """Undo what `_momentum_in_shards` did to a state that has been loaded. Collective."""
    for number, shard, state in _muon_groups(optimizer):
        part = state.get("exp_avg", torch.zeros_like(shard))  # a rank that holds padding alone may have loaded none
        state.clear()
        process_group = optimizer.real_dp_process_group[number]
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(process_group))]
        dist.all_gather(parts, part.contiguous(), group=process_group)
        elements = sum(parameter.numel() for parameter in optimizer.params_in_partition[number])
        if elements:
            start = dist.get_rank(process_group) * shard.numel() - optimizer.first_offset[number]
            state["momentum_buffer"] = torch.cat(parts)[start : start + elements].clone()


@contextmanager
def _padding_only_groups(optimizer: Any) -> Iterator[None]:
    """Give each parameter group of which this rank holds padding alone a stand-in while the block runs.

    DeepSpeed 0.19.8 reads a group's step from the first parameter that this rank holds, and fails with an IndexError if
    none is held: gates are few numbers, so with many ranks some hold none.
    """
    empty = [group for group in optimizer.bit16_groups if all(lp._hp_mapping is None for lp in group)]
    for group in empty:
        stand_in: Any = torch.empty(0)
        stand_in._hp_mapping = SimpleNamespace(get_optim_state_keys=list)
        stand_in.load_hp_checkpoint_state = lambda *_, **__: None
        optimizer.param_names[stand_in] = ""
        group.append(stand_in)
    try:
        yield
    finally:
        for group in empty:
            del optimizer.param_names[group.pop()]
