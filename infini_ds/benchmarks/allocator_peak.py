"""The peak of memory as PyTorch's allocator reports it: on a GPU by its statistics, on the CPU by the profiler."""

import gc
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


class AllocatorPeak:
    """Within `with AllocatorPeak(device) as memory:`, PyTorch's allocations are observed; then `memory.peak` has bytes.

    Temporaries inside operators count, but not what libraries and the C library's heap hold besides. The profiler
    misses some frees, so on the CPU a peak may be too high.
    """

    def __init__(self, device: torch.device):
        self.peak = 0
        self._device, self._profile = device, profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "AllocatorPeak":
        gc.collect()  # nothing from before may be freed during the measurement
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            if error is None:
                torch.cuda.synchronize(self._device)
                self.peak = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._profile.__exit__(kind, error, stack)
        if error is None:
            assert self._profile.profiler is not None and self._profile.profiler.kineto_results is not None
            self.peak = _peak(_allocations(self._profile.profiler.kineto_results.experimental_event_tree()))


def _peak(allocations: Iterable[tuple[int, int, int]]) -> int:
    sizes: dict[int, int] = {}
    in_use = peak = 0
    for _, size, pointer in sorted(allocations):
        in_use -= sizes.pop(pointer, 0)  # also before the address is used again: the profiler misses some frees
        if size > 0:
            sizes[pointer] = size
            in_use += size
        peak = max(peak, in_use)
    return peak


def _allocations(events: Iterable[Any]) -> list[tuple[int, int, int]]:
    """Return (time, bytes, address) of the profiler's tree of events; bytes are negative where memory is freed."""
    found = []
    for event in events:
        if event.tag.name == "Allocation":
            found.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr))
        found += _allocations(event.children)
    return found
