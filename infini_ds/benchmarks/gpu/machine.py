"""What a report says of the machine that it was made on."""

import importlib.util
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from infini_ds.planning.hardware import measured_flops, published_flops

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "infini-transformer-pytorch", "flash-attn")


@dataclass(frozen=True)
class Machine:
    """The device of the measurements.

    Attributes:
        device: its name; devices: how many of its kind there are, of which one is used.
        memory: bytes of the device; of the machine if it is a CPU.
        cuda: of PyTorch's build; None on a CPU. capability: of the GPU, such as "9.0".
        published_flops: dense bf16 FLOP/s by the data sheet, if the GPU is known.
        matrix_flops: FLOP/s of a large matrix product, measured, by precision.
        packages: version of each installed package.
    """

    device: str
    devices: int
    memory: int
    cuda: str | None
    capability: str | None
    published_flops: float | None
    matrix_flops: dict[str, float]
    packages: dict[str, str]


def describe_machine(device: torch.device) -> Machine:
    """Return the facts, and measure the rate of matrix products."""
    packages = {name: version(name) for name in PACKAGES if importlib.util.find_spec(name.replace("-", "_"))}
    if device.type == "cpu":
        memory, rates = psutil.virtual_memory().total, {"fp32": measured_flops(device, "fp32")}
        return Machine(cpu_name(), 1, memory, None, None, None, rates, packages)
    properties = torch.cuda.get_device_properties(device)
    return Machine(
        device=properties.name,
        devices=torch.cuda.device_count(),
        memory=properties.total_memory,
        cuda=torch.version.cuda,
        capability=f"{properties.major}.{properties.minor}",
        published_flops=published_flops(properties.name),
        matrix_flops={precision: measured_flops(device, precision) for precision in ("bf16", "fp32")},
        packages=packages,
    )


def cpu_name() -> str:
    """Return the name of the CPU and the number of threads."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else platform.machine()}, {torch.get_num_threads()} threads"
