"""The gradient of ZeRO against the same gradient in plain PyTorch: no engine, no sharding, no hooks on parameters.

Wrong gradients without any error were reported of ZeRO-2 where a submodule is used more than once in a step (DeepSpeed
issue 8224), which a model that recurs over segments does.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from infini_ds.training.hooks import Hook, Step
from infini_ds.training.trainer import Trainer
from infini_ds.utils.errors import UserError
from infini_ds.utils.rng import get_rng_states, set_rng_states

# Largest difference of a parameter's gradient, relative to its norm. Rounding differs with the order of sums, and bf16
# has 8 bits.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
NORM_FLOOR = 1e-3  # share of the complete gradient's norm that is added to each parameter's, which may be tiny


class GradientCheck(Hook):
    """Checks the first step that is made since the start; raises a UserError if its gradient is wrong.

    It takes the time of one more step, and memory for a second model and its complete gradient in fp32.
    """

    def __init__(self) -> None:
        self._rng_states: dict | None = None  # before the step's forward pass, so that dropout repeats
        self._done = False

    def on_step_start(self, trainer: Trainer, step: Step) -> None:
        if not self._done:
            self._rng_states = get_rng_states()

    def before_step(self, trainer: Trainer, step: Step) -> None:
        if self._done or step.skip or not math.isfinite(step.loss):
            return
        assert self._rng_states is not None
        after = get_rng_states()
        reference = unsharded_gradients(trainer, step, self._rng_states)
        set_rng_states(after)
        check_gradients(trainer, reference)
        self._done = True


def check_gradients(trainer: Trainer, reference: dict[str, Tensor]) -> None:
    """Raise a UserError if the engine's gradient differs from `reference` by more than rounding, on all ranks."""
    differences, norms = {}, {}
    for name, parameter in trainer.model.named_parameters():
        difference = trainer.engine.full_gradient(parameter).float() - reference[name]
        differences[name] = difference.norm().nan_to_num(torch.inf).item()
        norms[name] = reference[name].norm().item()
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    low_precision = trainer.run.precision == "bf16" or trainer.engine.autocast_dtype is not None
    tolerance = TOLERANCE[torch.bfloat16 if low_precision else torch.float32]
    relative = {name: differences[name] / (norms[name] + NORM_FLOOR * total) for name in norms if 0 < total < math.inf}
    worst = max(relative, key=lambda name: relative[name], default=None)
    if worst and relative[worst] > tolerance:
        raise UserError(
            f"stability.check_gradients: DeepSpeed's gradient for {worst} differs from an unsharded recompute by "
            f"{relative[worst]:.2g} of its norm, where {trainer.run.precision} explains {tolerance:g} "
            f"({sum(value > tolerance for value in relative.values())} of {len(relative)} parameters do): train with "
            "another version of DeepSpeed, or with zero_optimization.stage 1, until the check passes"
        )


def unsharded_gradients(trainer: Trainer, step: Step, rng_states: dict) -> dict[str, Tensor]:
    """Compute the gradient of the step by parameter, in fp32, the same on every rank.

    Each rank computes its own rows, or its part of them, with a copy of the model, and the gradients are summed over
    the ranks.
    """
    model, shape, device = trainer.model, trainer.run.batch_shape, trainer.device
    copy = type(model)(trainer.run.model_config).train(model.training)
    copy.to(device=device, dtype=model.dtype)
    copy.load_state_dict(model.state_dict())
    copy.block_schedule = model.block_schedule
    copy.sequence_group = model.sequence_group
    if trainer.recipe.model.gradient_checkpointing:
        copy.gradient_checkpointing_enable()
    set_rng_states(rng_states)
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in copy.named_parameters()}
    dtype = trainer.engine.autocast_dtype
    for micro_batch in step.batch.micro_batches(shape.micro_rows, device):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = copy(**micro_batch, num_items_in_batch=step.tokens_per_part).loss
        loss.backward()
        for name, parameter in copy.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad.float() / (trainer.run.dims.world_size * shape.accumulation)
                parameter.grad = None
    for gradient in sums.values():
        dist.all_reduce(gradient)
    return sums
