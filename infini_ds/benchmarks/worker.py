"""Measure one case of a benchmark: python -m infini_ds.benchmarks.worker training '{"contender": ...}'

Prints the result as one line of JSON.
"""

import ctypes
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList

from infini_ds.benchmarks.contenders import ModelShape, build_contender, is_infini
from infini_ds.benchmarks.results import GenerationSpeed, Operator, Profile, TrainingSpeed
from infini_ds.distributed.entry_point import run_main
from infini_ds.model import InfiniCache, InfiniGPTNeoForCausalLM
from infini_ds.model.cache import CACHE_NAME
from infini_ds.planning.flops import training_flops_per_token
from infini_ds.planning.hardware import peak_flops

WARM_UP_TOKENS = 4096  # enough to run every kernel once; longer rows are not run twice
NEW_TOKENS = 128  # the length of a segment by default, so that one segment of each row ends among them


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


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, including its work on the GPU."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def build_training_step(
    contender: str, tokens: int, shape: ModelShape, device: torch.device
) -> tuple[nn.Module, Callable[[], None]]:
    """Return the model and a training step (forward, backward, AdamW) on `tokens` tokens, after a warm-up step."""
    _limit_memory(device)
    model, forward_backward = build_contender(contender, shape, tokens, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(ids: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)  # so that gradients are not part of the step's memory
        forward_backward(ids)
        optimizer.step()

    torch.manual_seed(1)
    ids = torch.randint(0, shape.vocabulary, (1, tokens), device=device)
    step(ids[:, :WARM_UP_TOKENS])
    return model, lambda: step(ids)


def measure_training(contender: str, tokens: int, steps: int, shape: ModelShape, device: torch.device) -> TrainingSpeed:
    """Measure speed and memory of a training step, and before each step the rate of matrix products."""
    model, step = build_training_step(contender, tokens, shape, device)
    memory, times, rates = PeakMemory(device), [], []
    for _ in range(steps):
        rates.append(peak_flops(device, shape.precision))
        times.append(time_call(step, device))
    speed, rate = tokens / statistics.median(times), statistics.median(rates)
    if not is_infini(contender):
        return TrainingSpeed(speed, memory.read(), rate)
    assert isinstance(model, InfiniGPTNeoForCausalLM)
    flops = training_flops_per_token(shape.config())
    return TrainingSpeed(
        tokens_per_s=speed,
        peak_memory=memory.read(),
        matrix_flops=rate,
        mfu=speed * flops / rate,
        segments_per_block=model.block_schedule.segments_per_block,
        bound_tokens_per_s=rate / flops,
    )


def profile_training(contender: str, tokens: int, steps: int, shape: ModelShape, device: torch.device) -> Profile:
    """Measure the time in each operator during `steps` training steps."""
    _, step = build_training_step(contender, tokens, shape, device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(steps):
            time_call(step, device)
    own_time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"  # microseconds
    events = profiled.key_averages()
    operators = [Operator(event.key, getattr(event, own_time) / 1e6, event.count) for event in events]
    return Profile(tuple(sorted(operators, key=lambda operator: -operator.seconds)))


class TokenClock(StoppingCriteria):
    """Notes the time at each new token of `generate()`, and never stops it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure_generation(
    contender: str, tokens: int, rows: int, steps: int, shape: ModelShape, device: torch.device
) -> GenerationSpeed:
    """Measure greedy `generate()` with a cache, for `rows` prompts of `tokens` tokens; `steps` times."""
    _limit_memory(device)
    module, _ = build_contender(contender, shape, tokens + NEW_TOKENS, device)
    model = cast(GenerationMixin, module.eval())
    torch.manual_seed(1)
    ids = torch.randint(0, shape.vocabulary, (rows, tokens), device=device)

    def generate(prompt: Tensor) -> tuple[float, float, Any]:
        """Return the seconds until the first new token, those of each later one, and the cache."""
        clock, start = TokenClock(device), time.perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
            return_dict_in_generate=True,
        )
        first, *_, last = clock.times
        return first - start, (last - first) / (NEW_TOKENS - 1), getattr(out, CACHE_NAME)

    generate(ids[:, :WARM_UP_TOKENS])
    memory = PeakMemory(device)
    reading, times, caches = zip(*(generate(ids) for _ in range(steps)), strict=True)
    return GenerationSpeed(
        reading_tokens_per_s=rows * tokens / statistics.median(reading),
        seconds_per_token=statistics.median(times),
        cache_bytes=_cache_bytes(caches[-1]),
        peak_memory=memory.read(),
    )


def _cache_bytes(cache: Any) -> int:
    if isinstance(cache, InfiniCache):
        return cache.nbytes()
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def _limit_memory(device: torch.device) -> None:
    """On the CPU, let allocations beyond the available memory fail, so that the system does not start to swap."""
    if device.type == "cpu":
        limit = psutil.Process().memory_info().vms + psutil.virtual_memory().available
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


MEASURES: dict[str, Callable[..., TrainingSpeed | GenerationSpeed | Profile]] = {
    "training": measure_training,
    "profile": profile_training,
    "generation": measure_generation,
}


def main() -> None:
    kind, case = sys.argv[1], json.loads(sys.argv[2])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = MEASURES[kind](**case | {"shape": ModelShape(**case["shape"])}, device=device)
        print(json.dumps(asdict(result)))
    except (RuntimeError, MemoryError) as error:  # torch's CPU allocator raises a RuntimeError
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        print(json.dumps({"out_of_memory": True}))


if __name__ == "__main__":
    run_main(main)
