"""The table of GPUs, and what this machine's device has."""

import psutil
import pytest
import torch

from infini_ds.distributed.environment import DistEnv
from infini_ds.planning.hardware import GPUS, find_gpu, memory_free, memory_in_use, peak_flops, published_flops
from infini_ds.utils.errors import UserError

# Names that PyTorch and nvidia-smi print.
NAMES = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A40": 150e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA RTX A4000": None,
    "NVIDIA L40": None,
    "Tesla V100-SXM2-16GB": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_published_flops_by_the_name_of_the_driver(name):
    assert published_flops(name) == NAMES[name]


def test_names_say_how_much_memory_there_is_about():
    for name, gpu in GPUS.items():
        printed = int(name.rsplit("-", 1)[1].removesuffix("g"))
        assert name == gpu.name and 0.88 * printed < gpu.memory_gib <= printed
        assert gpu.source.startswith("NVIDIA") and 1e14 < gpu.bf16_flops < 1e15


@pytest.mark.parametrize(("name", "hint"), [("H100", "did you mean h100-80g"), ("tpu", "known are a10-24g, ")])
def test_unknown_gpu_gets_a_hint(name, hint):
    with pytest.raises(UserError, match=rf"plan\.gpu={name} is unknown.*{hint}.*--memory"):
        find_gpu(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
def test_a_cpu_is_measured():
    cpu = torch.device("cpu")
    assert 1e8 < peak_flops(cpu, "fp32") < 1e14
    alone, with_three = (memory_free(DistEnv(0, 0, ranks, ranks)) for ranks in (1, 4))
    available = psutil.virtual_memory().total
    assert 0 < with_three < alone <= available and 2**20 < memory_in_use(cpu) < available
