"""One figure in a process of its own: python -m infini_ds.benchmarks.worker training '{"contender": …}'

Prints one line of JSON.
"""

import ctypes
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.profiler import ProfilerActivity

from infini_ds.benchmarks.contenders import Shape, build
from infini_ds.model import InfiniCache, InfiniGPTNeoForCausalLM
from infini_ds.planning.flops import training_flops_per_token
from infini_ds.planning.hardware import peak_flops

WARM_UP = 4096  # tokens: enough to reach every kernel; longer sequences are not run twice
NEW_TOKENS = 64


class PeakMemory:
    """Bytes above what was there when this was made: resident memory on the CPU, allocated memory on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what is free in the heap goes back to the system
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of resident memory starts anew
            self.before = psutil.Process().memory_info().rss

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024 - self.before


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def training_step(
    contender: str, tokens: int, shape: Shape, device: torch.device
) -> tuple[nn.Module, Callable[[], None]]:
    """The model, and a training step of `tokens` tokens, forward, backward, AdamW, after a first one to warm up."""
    _limit_memory(device)
    model, forward_backward = build(contender, shape, tokens, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(ids: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)  # gradients are the model's own memory, not the step's
        forward_backward(ids)
        optimizer.step()

    torch.manual_seed(1)
    ids = torch.randint(0, shape.vocabulary, (1, tokens), device=device)
    step(ids[:, :WARM_UP])
    return model, lambda: step(ids)


def training(contender: str, tokens: int, steps: int, shape: Shape, device: torch.device) -> dict:
    """Speed and memory of a training step. The rate of matrix products is measured before each step."""
    model, step = training_step(contender, tokens, shape, device)
    memory, times, rates = PeakMemory(device), [], []
    for _ in range(steps):
        rates.append(peak_flops(device, shape.precision))
        times.append(seconds(step, device))
    speed = tokens / statistics.median(times)
    result = {"tokens_per_s": speed, "peak_memory": memory.read(), "matrix_flops": statistics.median(rates)}
    if contender.startswith("infini:"):
        flops = training_flops_per_token(shape.config())
        result |= {
            "mfu": speed * flops / result["matrix_flops"],
            "segments_per_block": model.block_schedule.segments_per_block,
            "bound_tokens_per_s": result["matrix_flops"] / flops,
        }
    return result


def profile(contender: str, tokens: int, steps: int, shape: Shape, device: torch.device) -> dict:
    """Seconds and calls of each operator in `steps` training steps, without those that it calls, the longest first."""
    _, step = training_step(contender, tokens, shape, device)
    kinds = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *kinds]) as profiled:
        for _ in range(steps):
            seconds(step, device)
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    operators = [(event.key, getattr(event, own) / 1e6, event.count) for event in profiled.key_averages()]
    return {"operators": sorted(operators, key=lambda operator: -operator[1])}


def generation(contender: str, tokens: int, steps: int, shape: Shape, device: torch.device) -> dict:
    """Time for one more token, one at a time, behind a text of `tokens` tokens; `contender` is infini:G."""
    model, _ = build(contender, shape, tokens, device)
    model.eval()
    torch.manual_seed(1)
    ids = torch.randint(0, shape.vocabulary, (1, tokens), device=device)
    with torch.inference_mode():
        model.generate(ids[:, :WARM_UP], max_new_tokens=2, do_sample=False)
        memory, cache = PeakMemory(device), InfiniCache(model.config, 1, model.dtype, device)
        reading = seconds(lambda: model(ids, past_key_values=cache, logits_to_keep=1), device)
        times = [_more_tokens(model, cache, device) for _ in range(steps)]
    return {
        "reading_tokens_per_s": tokens / reading,
        "seconds_per_token": statistics.median(times),
        "cache_bytes": cache.nbytes(),
        "peak_memory": memory.read(),
    }


def _more_tokens(model: InfiniGPTNeoForCausalLM, cache: InfiniCache, device: torch.device) -> float:
    """Seconds a token of greedy generation that goes on with the cache."""
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    def generate() -> None:
        nonlocal token
        for _ in range(NEW_TOKENS):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)

    return seconds(generate, device) / NEW_TOKENS


def _limit_memory(device: torch.device) -> None:
    """On the CPU a model that needs more than there is fails with an error, and the machine goes on."""
    if device.type == "cpu":
        limit = psutil.Process().memory_info().vms + psutil.virtual_memory().available
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    try:
        measure = {"training": training, "profile": profile, "generation": generation}[sys.argv[1]]
        task = json.loads(sys.argv[2])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(json.dumps(measure(**task | {"shape": Shape(**task["shape"])}, device=device)))
    except (RuntimeError, MemoryError) as error:  # torch's CPU allocator raises a RuntimeError
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        print(json.dumps({"failed": "out of memory"}))
