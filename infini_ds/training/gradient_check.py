"""The gradient of ZeRO against the same gradient in plain PyTorch: no engine, no sharding, no hooks on parameters.

Wrong gradients without any error were reported of ZeRO-2 where a submodule is used more than once in a step (DeepSpeed
issue 8224), which a model that recurs over segments does.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from infini_ds.data.batches import Batch
from infini_ds.training.setup import Training
from infini_ds.utils.errors import UserError
from infini_ds.utils.rng import get_rng_states, set_rng_states

# Of a parameter's gradient, by its norm. Rounding differs with the order of sums, and a bf16 number has 8 bits.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
SMALL = 1e-3  # of the norm of the whole gradient: what a parameter's own may be off by in any case, times the tolerance


def check_gradients(run: Training, batch: Batch, items: Tensor, states: dict) -> None:
    """Between the last backward pass of a step and the optimizer, on all ranks: compute the step's gradient again.

    It takes the time of one more step, and memory for the model once more and its whole gradient in fp32.

    Args:
        items: predicted tokens of the batch for each of its parts. states: random states before its first part.
    Raises:
        UserError: the gradients differ by more than rounding.
    """
    from infini_ds.training.engine import full_gradient

    now = get_rng_states()
    reference = unsharded_gradients(run, batch, items, states)
    set_rng_states(now)
    differences, norms = {}, {}
    for name, parameter in run.model.named_parameters():
        differences[name] = (full_gradient(parameter).float() - reference[name]).norm().nan_to_num(torch.inf).item()
        norms[name] = reference[name].norm().item()
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    lowered = run.precision == "bf16" or run.engine.torch_autocast_enabled()
    tolerance = TOLERANCE[torch.bfloat16 if lowered else torch.float32]
    off = {name: differences[name] / (norms[name] + SMALL * total) for name in norms if 0 < total < torch.inf}
    worst = max(off, key=off.get, default=None)
    if worst and off[worst] > tolerance:
        raise UserError(
            f"stability.check_gradients: the gradient that DeepSpeed has summed up for {worst} differs from an unsharded "
            f"recompute by {off[worst]:.2g} of its norm, where {run.precision} explains {tolerance:g} "
            f"({sum(value > tolerance for value in off.values())} of {len(off)} parameters do): train with another "
            "version of DeepSpeed, or with zero_optimization.stage 1, until the check passes"
        )


def unsharded_gradients(run: Training, batch: Batch, items: Tensor, states: dict) -> dict[str, Tensor]:
    """The gradient of the whole step by parameter, fp32, the same on every rank: each computes its own rows with a copy
    of the model, and the sums go over the ranks.
    """
    model, engine = run.model, run.engine
    device, shape = run.process.device, run.shape
    copy = type(model)(model.config).to(device, next(model.parameters()).dtype).train(model.training)
    copy.load_state_dict(model.state_dict())
    copy.block_schedule = model.block_schedule
    if run.recipe.model.gradient_checkpointing:
        copy.gradient_checkpointing_enable()
    set_rng_states(states)
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in copy.named_parameters()}
    lowered = torch.autocast(device.type, engine.torch_autocast_dtype(), enabled=engine.torch_autocast_enabled())
    for micro_batch in batch.micro_batches(shape.micro_rows, device):
        with lowered:
            loss = copy(**micro_batch, num_items_in_batch=items).loss
        loss.backward()
        for name, parameter in copy.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad.float() / (shape.data_size * shape.accumulation)
                parameter.grad = None
    for gradient in sums.values():
        dist.all_reduce(gradient)
    return sums
