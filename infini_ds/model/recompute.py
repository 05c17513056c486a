"""Gradient checkpointing of all blocks of a sequence in one node of autograd's graph.

`torch.utils.checkpoint` around each block would keep the block's states, and its graph without the tensors, until the
backward pass. Such small, long-lived allocations between activations that come and go fragment the C library's heap: on
the CPU a process then grew by 90 times what was kept (docs/performance.md). In this form only one tensor is kept, with
the states before all blocks, and it is allocated first.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import get_device_states, set_device_states

Tensors = tuple[Tensor | None, ...]
States = tuple[Tensor, ...]
OutputT = TypeVar("OutputT", bound=Tensors)


def checkpoint_blocks(
    block: Callable[[int, States], tuple[OutputT, States]],
    blocks: int,
    states: States,
    module: nn.Module,
    uses_rng: bool = False,
    offload: bool = False,
) -> tuple[list[OutputT], States]:
    """Run `outputs, states = block(index, states)` for each block in turn, and recompute it in the backward pass.

    Gradients flow to the parameters, and through the states from block to block.

    Args:
        states: before the first block: of one dtype and without gradient; each block returns the same shapes.
        module: the module whose parameters the blocks use.
        uses_rng: the blocks draw random numbers, which the recomputation has to repeat.
        offload: keep the states on the CPU.
    Returns:
        The outputs of each block, and the states after the last block.
    """
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    flat = _CheckpointedBlocks.apply(
        _BlockModule(block, module), blocks, len(states), tuple(weights), uses_rng, offload, *states, *weights.values()
    )
    outputs, states = flat[: -len(states)], flat[-len(states) :]
    per_block = len(outputs) // blocks
    return [cast(OutputT, outputs[i : i + per_block]) for i in range(0, len(outputs), per_block)], states


class _BlockModule(nn.Module):
    """A block as a module, so that `functional_call` can replace its parameters."""

    def __init__(self, block: Callable[[int, States], tuple[Tensors, States]], module: nn.Module):
        super().__init__()
        self.block, self.module = block, module

    def forward(self, index: int, states: States) -> tuple[Tensors, States]:
        return self.block(index, states)


class _CheckpointedBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        block: _BlockModule,
        blocks: int,
        state_count: int,
        names: tuple[str, ...],
        uses_rng: bool,
        offload: bool,
        *tensors: Tensor,
    ) -> Tensors:
        states, weights = tensors[:state_count], tensors[state_count:]
        device, shapes = states[0].device, [x.shape for x in states]
        pinned = offload and device.type == "cuda"
        saved_states = states[0].new_empty(
            blocks, sum(x.numel() for x in states), device="cpu" if offload else device, pin_memory=pinned
        )
        rng_states: list[tuple | None] = []
        outputs: list[Tensor | None] = []
        for index in range(blocks):
            for saved, x in zip(_views(saved_states[index], shapes), states, strict=True):
                saved.copy_(x, non_blocking=pinned)
            rng_states.append(_get_rng_state(device) if uses_rng else None)
            block_outputs, states = block(index, states)
            outputs += block_outputs
        ctx.save_for_backward(saved_states, *weights)
        ctx.set_materialize_grads(False)
        ctx.block, ctx.names, ctx.shapes, ctx.device, ctx.rng_states = block, names, shapes, device, rng_states
        ctx.autocast = [
            {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
            for kind in {device.type, "cpu"}
        ]
        return *outputs, *states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> Tensors:
        saved_states, *weights = ctx.saved_tensors
        # Gradients accumulate in copies, so that a hook on a weight runs once, with the sum over all blocks.
        copies = [nn.Parameter(weight.detach()) for weight in weights]
        by_name: dict[str, Tensor] = {f"module.{name}": copy for name, copy in zip(ctx.names, copies, strict=True)}
        state_count, blocks = len(ctx.shapes), len(saved_states)
        output_grads, state_grads = gradients[:-state_count], gradients[-state_count:]
        per_block = len(output_grads) // blocks
        for index in reversed(range(blocks)):
            states = [x.to(ctx.device).requires_grad_() for x in _views(saved_states[index], ctx.shapes)]
            with ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                for settings in ctx.autocast:
                    stack.enter_context(torch.autocast(**settings))
                if ctx.rng_states[index] is not None:
                    stack.enter_context(_restored_rng(*ctx.rng_states[index]))
                outputs, after = functional_call(ctx.block, by_name, (index, states))
            block_grads = output_grads[index * per_block : (index + 1) * per_block]
            pairs = zip((*outputs, *after), (*block_grads, *state_grads), strict=True)
            roots = [(x, gradient) for x, gradient in pairs if gradient is not None and x.requires_grad]
            del outputs, after, pairs
            if roots:
                torch.autograd.backward([x for x, _ in roots], [gradient for _, gradient in roots])
            del roots
            state_grads = tuple(x.grad for x in states)
        return *(None,) * (6 + state_count), *(copy.grad for copy in copies)


def _views(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Return consecutive parts of a vector as views, one of each shape."""
    return [part.view(shape) for part, shape in zip(flat.split([x.numel() for x in shapes]), shapes, strict=True)]


def _get_rng_state(device: torch.device) -> tuple[Tensor, list[int], list[Tensor]]:
    return torch.get_rng_state(), *get_device_states(torch.empty(0, device=device))


@contextmanager
def _restored_rng(cpu: Tensor, devices: list[int], states: list[Tensor]) -> Iterator[None]:
    """Use the given random states inside of the context, and restore the present ones after it."""
    with torch.random.fork_rng(devices):
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        yield
