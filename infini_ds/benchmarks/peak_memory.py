"""The peak of memory as the system shows it: resident memory on the CPU, allocated memory on a GPU."""

import ctypes
from pathlib import Path

import psutil
import torch


class PeakMemory:
    """Peak memory above what was in use at the start: resident memory on the CPU, allocated memory on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)  # return what is free in the heap to the system
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak of resident memory, see man 5 proc
            self.before = psutil.Process().memory_info().rss

    def read(self) -> int:
        """Return bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024 - self.before
