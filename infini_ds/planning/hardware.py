"""Operations a token costs, what the device can do at most, and the memory in use and free."""

import re
import time

import psutil
import torch

from infini_ds.distributed.environment import DistEnv
from infini_ds.model import InfiniGPTNeoConfig
from infini_ds.model.memory_rule import get_memory_rule

# Dense bf16 matrix products, FLOP/s, from NVIDIA's data sheets (without sparsity).
PUBLISHED_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


def training_flops_per_token(config: InfiniGPTNeoConfig) -> float:
    """Operations of one token's forward and backward pass, recomputing not counted (as MFU is defined in PaLM, app. B).

    2 for each multiply-add, 3 times for forward and backward: the matrices of all layers and the output layer; local
    attention over half a segment on average; what the memory rule reads and writes.
    """
    E, S = config.hidden_size, config.segment_length
    inner = config.intermediate_size or 4 * E
    matrices = config.num_layers * (4 * E * E + 2 * E * inner) + E * config.vocab_size
    windows = [config.window_size if kind == "local" else S for kind in config.attention_layers]
    attended = sum(2 * E * min(S, 2 * window) / 2 for window in windows)
    memory = config.num_layers * get_memory_rule(config.memory_rule).flops_per_token(config)
    return 6.0 * (matrices + attended + memory)


def peak_flops(device: torch.device, precision: str) -> float:
    """Matrix products a second at most: published where the device is known, else measured here, in about a second."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for known, rate in PUBLISHED_BF16.items():
            if re.search(rf"\b{re.escape(known)}\b", name):
                return rate
    # bf16 without native instructions is so slow that a small product has to do.
    n = 8192 if device.type == "cuda" else 1536 if precision == "fp32" else 256
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak on a GPU since the last call, the resident set of this process on the CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return psutil.Process().memory_info().rss


def memory_free(process: DistEnv) -> int:
    """Bytes that this rank may take: what its GPU has left, or on the CPU its share of what the node has available."""
    if process.device.type == "cuda":
        return torch.cuda.mem_get_info(process.device)[0]
    return psutil.virtual_memory().available // process.local_world_size
