"""The GPUs and links that are known by name, and what a device has: peak FLOP/s, memory in use, free memory."""

import re
import time
from dataclasses import dataclass

import psutil
import torch

from infini_ds.distributed.environment import DistEnv
from infini_ds.utils.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Link:
    """What connects GPUs.

    Attributes:
        bandwidth: bytes/s that a GPU sends while it receives as much.
        hop: seconds from a rank to the next one of a ring.
        source: where `bandwidth` is published.
    """

    name: str
    bandwidth: float
    hop: float
    source: str


# Seconds in which NCCL starts a collective, and of one hop: its own model of a ring with the protocol "Simple", that of
# messages of a MB and more (NCCL, src/graph/tuning.cc: baseLatencies and hwLatencies).
COLLECTIVE_START = 8.4e-6
NVLINK_HOP, PCIE_HOP, NETWORK_HOP = 3.4e-6, 5.7e-6, 14.0e-6

LINKS = {
    link.name: link
    for link in (
        Link("NVLink 4", 450e9, NVLINK_HOP, "NVIDIA H100 data sheet: 900 GB/s, both directions together"),
        Link("NVLink 3", 300e9, NVLINK_HOP, "NVIDIA A100 data sheet: 600 GB/s, both directions together"),
        Link("PCIe 5", 64e9, PCIE_HOP, "NVIDIA H100 data sheet, PCIe: 128 GB/s, both directions together"),
        Link("PCIe 4", 32e9, PCIE_HOP, "NVIDIA L40S data sheet: 64 GB/s, both directions together"),
        Link("InfiniBand NDR", 50e9, NETWORK_HOP, "NVIDIA DGX H100 data sheet: 400 Gb/s for each GPU"),
        Link("InfiniBand HDR", 25e9, NETWORK_HOP, "NVIDIA DGX A100 data sheet: 200 Gb/s for each GPU"),
    )
}


@dataclass(frozen=True)
class Gpu:
    """A GPU that a plan can name.

    Attributes:
        name: value of `plan.gpu`.
        device_name: a regular expression that the name in PyTorch and the driver matches.
        memory_gib: GiB of memory that the driver reports, which is less than the name says.
        bf16_flops: dense bf16 matrix products, FLOP/s, without sparsity.
        source: where `bf16_flops` is published.
        links: names of the links to the GPUs of its node, and to those of other nodes.
    """

    name: str
    device_name: str
    memory_gib: float
    bf16_flops: float
    source: str
    links: tuple[str, str] = ("PCIe 4", "InfiniBand HDR")


HOPPER, AMPERE = ("NVLink 4", "InfiniBand NDR"), ("NVLink 3", "InfiniBand HDR")

# The first match counts, so the PCIe card comes before the others of its name.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200-141g", r"\bH200\b", 140.4, 989e12, "NVIDIA H200 data sheet", HOPPER),
        Gpu("h100-pcie-80g", r"\bH100 PCIe\b", 79.6, 756e12, "NVIDIA H100 data sheet", ("PCIe 5", "InfiniBand NDR")),
        Gpu("h100-80g", r"\bH100\b", 79.6, 989e12, "NVIDIA H100 data sheet, SXM", HOPPER),
        Gpu("a100-80g", r"\bA100\b.*\b80GB\b", 79.3, 312e12, "NVIDIA A100 data sheet", AMPERE),
        Gpu("a100-40g", r"\bA100\b", 39.4, 312e12, "NVIDIA A100 data sheet", AMPERE),
        Gpu("l40s-48g", r"\bL40S\b", 44.6, 362e12, "NVIDIA L40S data sheet"),
        Gpu("a40-48g", r"\bA40\b", 44.5, 150e12, "NVIDIA A40 data sheet"),
        Gpu("rtx4090-24g", r"\bRTX 4090\b", 23.5, 165e12, "NVIDIA Ada GPU architecture white paper"),
        Gpu("a10-24g", r"\bA10\b", 22.1, 125e12, "NVIDIA A10 data sheet"),
        Gpu("l4-24g", r"\bL4\b", 22.0, 121e12, "NVIDIA L4 data sheet"),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of this name.

    Raises:
        UserError: it is unknown.
    """
    if name not in GPUS:
        hint = did_you_mean(name.lower(), GPUS).removesuffix("?")
        raise UserError(f"plan.gpu={name} is unknown{hint}; for a GPU without a name give plan.memory=GIB (--memory)")
    return GPUS[name]


def published_flops(device_name: str) -> float | None:
    """Return the published dense bf16 FLOP/s of the GPU that the driver calls `device_name`; None if it is unknown."""
    return next((gpu.bf16_flops for gpu in GPUS.values() if re.search(gpu.device_name, device_name)), None)


def peak_flops(device: torch.device, precision: str) -> float:
    """Return how many FLOP/s matrix products reach at most: the published rate of a GPU in bf16, otherwise measured."""
    if device.type == "cuda" and precision == "bf16":
        published = published_flops(torch.cuda.get_device_name(device))
        if published is not None:
            return published
    return measured_flops(device, precision)


def measured_flops(device: torch.device, precision: str) -> float:
    """Measure the FLOP/s of a large matrix product, which takes about a second."""
    # A CPU without bf16 instructions is so slow in bf16 that the product has to be small.
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
    """Return bytes: of a GPU the peak since the last call, of a CPU the resident set of this process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return psutil.Process().memory_info().rss


def memory_free(environment: DistEnv) -> int:
    """Return the bytes that this rank may take: what its GPU has free, or an equal part, for each rank of this node, of
    the memory that is available.
    """
    if environment.device.type == "cuda":
        return torch.cuda.mem_get_info(environment.device)[0]
    return psutil.virtual_memory().available // environment.local_world_size
