"""Gradient checkpointing over a chain of blocks, in one node of autograd's graph.

`torch.utils.checkpoint` around each block keeps the block's states, and its graph without the tensors, until the
backward pass. What is small and stays, allocated between activations that come and go, cuts the C library's heap into
pieces: on the CPU a process then grew by 90 times what was kept (docs/performance.md). Here nothing stays but one
tensor, allocated first, with the states before all blocks.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import get_device_states, set_device_states

Tensors = tuple[Tensor | None, ...]
Block = Callable[[int, Tensors], tuple[Tensors, Tensors]]


def recomputed(
    block: Block, blocks: int, states: Tensors, module: nn.Module, draws: bool = False, offload: bool = False
) -> tuple[list[Tensors], Tensors]:
    """`outputs, states = block(index, states)` for each block in turn, computed again in the backward pass.

    Gradients flow to the parameters, and through the states from block to block.

    Args:
        states: before the first block: of one dtype and without gradient; of the same shapes after each block.
        module: whose parameters the blocks use.
        draws: the blocks draw random numbers, which have to be the same again.
        offload: keep the states on the CPU.
    Returns:
        The outputs of each block, and the states after the last.
    """
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    flat = _Chain.apply(
        _Call(block, module), blocks, len(states), tuple(weights), draws, offload, *states, *weights.values()
    )
    outputs, states = flat[: -len(states)], flat[-len(states) :]
    each = len(outputs) // blocks
    return [outputs[i : i + each] for i in range(0, len(outputs), each)], states


class _Call(nn.Module):
    """A block as a module, for `functional_call`."""

    def __init__(self, block: Block, module: nn.Module):
        super().__init__()
        self.block, self.module = block, module

    def forward(self, index: int, states: Tensors) -> tuple[Tensors, Tensors]:
        return self.block(index, states)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, call: _Call, blocks: int, count: int, names: tuple[str, ...], draws: bool, offload: bool, *tensors: Tensor
    ) -> Tensors:
        states, weights = tensors[:count], tensors[count:]
        device, shapes = states[0].device, [x.shape for x in states]
        pinned = offload and device.type == "cuda"
        room = states[0].new_empty(
            blocks, sum(x.numel() for x in states), device="cpu" if offload else device, pin_memory=pinned
        )
        random, outputs = [], []
        for index in range(blocks):
            for kept, x in zip(_parts(room[index], shapes), states, strict=True):
                kept.copy_(x, non_blocking=pinned)
            random.append(_random_state(device) if draws else None)
            results, states = call(index, states)
            outputs += results
        ctx.save_for_backward(room, *weights)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.names, ctx.shapes, ctx.device, ctx.random = call, names, shapes, device, random
        ctx.autocast = [
            {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
            for kind in {device.type, "cpu"}
        ]
        return *outputs, *states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> Tensors:
        room, *weights = ctx.saved_tensors
        # Gradients are summed at copies, so that hooks of the weights themselves see the sum over all blocks alone.
        copies = [nn.Parameter(weight.detach()) for weight in weights]
        by_name = {f"module.{name}": copy for name, copy in zip(ctx.names, copies, strict=True)}
        count = len(ctx.shapes)
        of_outputs, of_states = gradients[:-count], gradients[-count:]
        each = len(of_outputs) // len(room)
        for index in reversed(range(len(room))):
            states = [x.to(ctx.device).requires_grad_() for x in _parts(room[index], ctx.shapes)]
            with ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                for settings in ctx.autocast:
                    stack.enter_context(torch.autocast(**settings))
                if ctx.random[index] is not None:
                    stack.enter_context(_random_numbers_of(*ctx.random[index]))
                results, after = functional_call(ctx.call, by_name, (index, states))
            given = zip((*results, *after), (*of_outputs[index * each :][:each], *of_states), strict=True)
            given = [(x, gradient) for x, gradient in given if gradient is not None and x.requires_grad]
            del results, after
            if given:
                torch.autograd.backward(*zip(*given, strict=True))
            del given
            of_states = [x.grad for x in states]
        return *(None,) * (6 + count), *(copy.grad for copy in copies)


def _parts(numbers: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Views of a vector, one of each shape."""
    return [part.view(shape) for part, shape in zip(numbers.split([x.numel() for x in shapes]), shapes, strict=True)]


def _random_state(device: torch.device) -> tuple[Tensor, list[int], list[Tensor]]:
    return torch.get_rng_state(), *get_device_states(torch.empty(0, device=device))


@contextmanager
def _random_numbers_of(cpu: Tensor, devices: list[int], states: list[Tensor]) -> Iterator[None]:
    with torch.random.fork_rng(devices):
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        yield
