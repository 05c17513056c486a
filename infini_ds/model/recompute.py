"""Gradient checkpointing of all blocks of a sequence in one node of autograd's graph.

`torch.utils.checkpoint` around each block would keep the block's states, and its graph without the tensors, until the
backward pass. Such small, long-lived allocations between activations that come and go fragment the C library's heap: on
the CPU a process then grew by 90 times what was kept (docs/performance.md). In this form only one tensor is kept, with
the states before all blocks, and it is allocated first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call
from torch.utils.checkpoint import get_device_states, set_device_states

Tensors = tuple[Tensor | None, ...]
States = tuple[Tensor, ...]
OutputT = TypeVar("OutputT", bound=Tensors)


def checkpoint_blocks(
    block: Callable[[int, States, Tensor | None], tuple[OutputT, States]],
    blocks: int,
    states: States,
    module: nn.Module,
    offload: bool = False,
    inputs: Sequence[Tensor] = (),
) -> tuple[list[OutputT], States]:
    """Run `outputs, states = block(index, states, input)` for each block in turn, and again in the backward pass.

    Gradients flow to the parameters and the inputs, and through the states from block to block. Whatever random numbers
    a block draws, from the configuration's dropout, from a module that was added to the model, or from a hook, the
    recomputation draws the same. Nothing is kept or restored for a block that draws none.

    Args:
        states: before the first block: of one dtype and without gradient; each block returns the same shapes.
        module: the module whose parameters the blocks use.
        offload: keep the states on the CPU.
        inputs: a tensor for each block, which is kept; empty if the blocks have none.
    Returns:
        The outputs of each block, and the states after the last block.
    """
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    counts = blocks, len(states), len(inputs)
    flat = _CheckpointedBlocks.apply(
        _BlockModule(block, module), counts, tuple(weights), offload, *states, *inputs, *weights.values()
    )
    outputs, states = flat[: -len(states)], flat[-len(states) :]
    per_block = len(outputs) // blocks
    return [cast(OutputT, outputs[i : i + per_block]) for i in range(0, len(outputs), per_block)], states


class _BlockModule(nn.Module):
    """A block as a module, so that `functional_call` can replace its parameters."""

    def __init__(self, block: Callable[[int, States, Tensor | None], tuple[Tensors, States]], module: nn.Module):
        super().__init__()
        self.block, self.module = block, module

    def forward(self, index: int, states: States, block_input: Tensor | None) -> tuple[Tensors, States]:
        return self.block(index, states, block_input)


class _CheckpointedBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        block: _BlockModule,
        counts: tuple[int, int, int],
        names: tuple[str, ...],
        offload: bool,
        *tensors: Tensor,
    ) -> Tensors:
        blocks, state_count, input_count = counts
        states, kept = tensors[:state_count], tensors[state_count:]
        device, shapes = states[0].device, [x.shape for x in states]
        pinned = offload and device.type == "cuda"
        saved_states = states[0].new_empty(
            blocks, sum(x.numel() for x in states), device="cpu" if offload else device, pin_memory=pinned
        )
        rng = _RandomStates(tensors)
        rng_states: list[list[Tensor] | None] = []
        rng_before = rng.get()
        outputs: list[Tensor | None] = []
        for index in range(blocks):
            for saved, x in zip(_views(saved_states[index], shapes), states, strict=True):
                saved.copy_(x, non_blocking=pinned)
            block_outputs, states = block(index, states, kept[index] if input_count else None)
            outputs += block_outputs
            rng_after = rng.get()
            drawn = not all(map(torch.equal, rng_before, rng_after))
            rng_states.append(rng_before if drawn else None)
            rng_before = rng_after
        ctx.save_for_backward(saved_states, *kept)
        ctx.set_materialize_grads(False)
        ctx.block, ctx.names, ctx.shapes, ctx.device, ctx.input_count = block, names, shapes, device, input_count
        ctx.rng, ctx.rng_states = rng, rng_states
        ctx.autocast = [
            {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
            for kind in {device.type, "cpu"}
        ]
        return *outputs, *states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> Tensors:
        saved_states, *kept = ctx.saved_tensors
        inputs, weights = kept[: ctx.input_count], kept[ctx.input_count :]
        # Gradients accumulate in copies, so that a hook on a weight runs once, with the sum over all blocks.
        copies = [nn.Parameter(weight.detach()) for weight in weights]
        by_name: dict[str, Tensor] = {f"module.{name}": copy for name, copy in zip(ctx.names, copies, strict=True)}
        state_count, blocks = len(ctx.shapes), len(saved_states)
        output_grads, state_grads = gradients[:-state_count], gradients[-state_count:]
        per_block = len(output_grads) // blocks
        input_grads: list[Tensor | None] = [None] * len(inputs)
        for index in reversed(range(blocks)):
            block_input = None
            if inputs:
                block_input = inputs[index].detach().requires_grad_(ctx.needs_input_grad[4 + state_count + index])
            states = [x.to(ctx.device).requires_grad_() for x in _views(saved_states[index], ctx.shapes)]
            with ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                for settings in ctx.autocast:
                    stack.enter_context(torch.autocast(**settings))
                if ctx.rng_states[index] is not None:
                    stack.enter_context(ctx.rng.restored(ctx.rng_states[index]))
                outputs, after = functional_call(ctx.block, by_name, (index, states, block_input))
            block_grads = output_grads[index * per_block : (index + 1) * per_block]
            pairs = zip((*outputs, *after), (*block_grads, *state_grads), strict=True)
            roots = [(x, gradient) for x, gradient in pairs if gradient is not None and x.requires_grad]
            del outputs, after, pairs
            if roots:
                torch.autograd.backward([x for x, _ in roots], [gradient for _, gradient in roots])
            del roots
            state_grads = tuple(x.grad for x in states)
            if block_input is not None:
                input_grads[index] = block_input.grad
        return *(None,) * (4 + state_count), *input_grads, *(copy.grad for copy in copies)


def _views(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Return consecutive parts of a vector as views, one of each shape."""
    return [part.view(shape) for part, shape in zip(flat.split([x.numel() for x in shapes]), shapes, strict=True)]


class _RandomStates:
    """The states of the generators that a forward pass on the tensors' devices may draw from."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.fake = any(isinstance(x, FakeTensor) for x in tensors)
        devices = set() if self.fake else {x.device for x in tensors if x.device.type not in ("cpu", "meta")}
        self.of_devices = [torch.empty(0, device=device) for device in devices]

    def get(self) -> list[Tensor]:
        """Return the states, that of the CPU first; none for fake tensors, which have no contents."""
        if self.fake:
            return []
        states = [torch.get_rng_state()]
        if self.of_devices:
            states += get_device_states(*self.of_devices)[1]
        return states

    @contextmanager
    def restored(self, states: list[Tensor]) -> Iterator[None]:
        """Use the given states inside of the context, and restore the present ones after it."""
        devices = get_device_states(*self.of_devices)[0] if self.of_devices else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(states[0])
            if devices:
                set_device_states(devices, states[1:])
            yield
