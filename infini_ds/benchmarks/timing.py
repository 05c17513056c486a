"""The time that work takes, on the CPU or on a GPU."""

import time
from collections.abc import Callable

import torch

WARM_UP_TOKENS = 4096  # enough to run every kernel once; longer rows are not run twice


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, including its work on the GPU, and nothing of the work before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
