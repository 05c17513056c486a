"""The peak of memory, as PyTorch's allocator reports it to a profiler with `profile_memory=True`."""

from torch.profiler import profile


def peak_bytes(profiled: profile) -> int:
    """Return the most bytes that were allocated at a time, of what was allocated while the profiler ran."""
    allocated, in_use, peak = {}, 0, 0
    for _, size, pointer in sorted(_allocations(profiled.profiler.kineto_results.experimental_event_tree())):
        in_use -= allocated.pop(pointer, 0)  # also before the address is used again: the profiler misses some frees
        if size > 0:
            allocated[pointer] = size
            in_use += size
        peak = max(peak, in_use)
    return peak


def _allocations(events) -> list[tuple[int, int, int]]:
    """Return (time, bytes, address) of the profiler's tree of events; bytes are negative where memory is freed."""
    found = []
    for event in events:
        if event.tag.name == "Allocation":
            found.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr))
        found += _allocations(event.children)
    return found
