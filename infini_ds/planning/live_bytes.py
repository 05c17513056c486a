"""Count the bytes of tensors that are alive while code runs on fake tensors, which have shapes but no contents."""

import sys
import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

# Operators that consist of others, whose intermediate tensors count too. The softmax of bf16 in fp32 first copies its
# input, on CPUs and GPUs alike.
COMPOSED = {torch.ops.aten.softmax.int_out}

WRAPPERS = ("torch/_compile.py", "torch/_dynamo/eval_frame.py")  # of `__torch_dispatch__`


class LiveBytes(FakeTensorMode):
    """Within `with LiveBytes() as live:`, tensors are fake, and `live` knows how many bytes their storages have.

    Every output of an operator is counted from its allocation to its last reference. Memory that a kernel allocates
    for itself is not seen. Where two gradients meet, the autograd engine allocates their sum, which it computes in
    place for real tensors, so a peak at such a moment is too high by one gradient.

    Attributes:
        now: bytes that are alive.
        peak: most bytes that were alive since the last `start_interval`.
        interval: number of intervals that were started.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.interval = 0
        self._storages: dict[int, tuple[weakref.ref, int]] = {}  # by address: storage, interval of its allocation
        self._in_operator = False

    def start_interval(self) -> None:
        """Begin a new peak, with the bytes that are alive now."""
        self.peak, self.interval = self.now, self.interval + 1

    def allocated_in(self, tensor: Tensor) -> int:
        """Return the interval in which the storage of `tensor` was allocated."""
        return self._storages[tensor.untyped_storage()._cdata][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls, so the short way
            return args[0].fake_device
        if self._in_operator:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func in COMPOSED:
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        self._in_operator = True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._in_operator = False
        is_sum = func is torch.ops.aten.add.Tensor and _called_by_engine()
        for output in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(output, Tensor):
                self._count(output, in_place=is_sum)
        return result

    def _count(self, tensor: Tensor, in_place: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def forget(_: weakref.ref) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, forget), self.interval
        self.now += size
        if not in_place:
            self.peak = max(self.peak, self.now)


def _called_by_engine() -> bool:
    """Return whether the autograd engine itself called the operator that is dispatched, not a node of the graph that is
    written in Python, or recomputation.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.endswith(WRAPPERS):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"
