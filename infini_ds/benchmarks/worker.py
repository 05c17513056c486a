"""Measure one case of a benchmark: python -m infini_ds.benchmarks.worker training '{"contender": ...}'

Prints the result as one line of JSON.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList

from infini_ds.benchmarks.contenders import ModelShape, build_contender, is_infini
from infini_ds.benchmarks.gpu.comparison import CheckResult
from infini_ds.benchmarks.gpu.machine import Machine, describe_machine
from infini_ds.benchmarks.gpu.model_checks import (
    check_compiled,
    check_flex_kernel,
    check_flex_model,
    check_generation,
    check_rounding,
)
from infini_ds.benchmarks.gpu.training_checks import check_losses, check_memory_plan
from infini_ds.benchmarks.peak_memory import PeakMemory
from infini_ds.benchmarks.process import OUT_OF_MEMORY
from infini_ds.benchmarks.results import GenerationSpeed, Operator, Profile, TrainingSpeed
from infini_ds.benchmarks.timing import WARM_UP_TOKENS, time_call
from infini_ds.distributed.entry_point import run_main
from infini_ds.model import InfiniCache, InfiniGPTNeoForCausalLM
from infini_ds.model.cache import CACHE_NAME
from infini_ds.planning.flops import training_flops_per_token
from infini_ds.planning.hardware import peak_flops
from infini_ds.training.model_builder import set_matmul_precision

NEW_TOKENS = 128  # the length of a segment by default, so that one segment of each row ends among them


def build_training_step(
    contender: str, tokens: int, shape: ModelShape, device: torch.device
) -> tuple[nn.Module, Callable[[], None]]:
    """Return the model and a training step (forward, backward, AdamW) on `tokens` tokens, after a warm-up step."""
    _limit_memory(device)
    set_matmul_precision(shape.precision, device)
    model, forward_backward = build_contender(contender, shape, tokens, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(ids: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)  # so that gradients are not part of the step's memory
        forward_backward(ids)
        optimizer.step()

    torch.manual_seed(1)
    ids = torch.randint(0, shape.vocabulary, (1, tokens), device=device)
    # A GPU chooses kernels, and a compiler compiles, for each shape: the warm-up has the shapes of the measurement.
    step(ids if device.type == "cuda" or shape.compiled else ids[:, :WARM_UP_TOKENS])
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
    seconds = [time_call(step, device) for _ in range(steps)] if device.type == "cuda" else []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(steps):
            time_call(step, device)
    operators = own_times(profiled.key_averages(), device)
    computing = sum(operator.seconds for operator in operators)
    return Profile(operators, busy=min(1.0, computing / sum(seconds)) if seconds else None)


def own_times(events: Iterable[FunctionEventAvg], device: torch.device) -> tuple[Operator, ...]:
    """Return the time in each operator, or in each kernel of a GPU, without what it calls, the slowest first.

    On a GPU the time of a kernel is also in the operator that launched it, so kernels alone are counted.
    """
    if device.type == "cuda":
        # An annotation spans the kernels in it. Older versions of torch do not tell it from a kernel.
        kernels = [one for one in events if one.device_type == DeviceType.CUDA]
        kernels = [one for one in kernels if not getattr(one, "is_user_annotation", False)]
        operators = [Operator(str(one.key), one.self_device_time_total / 1e6, one.count) for one in kernels]
    else:
        operators = [Operator(str(one.key), one.self_cpu_time_total / 1e6, one.count) for one in events]
    return tuple(sorted(operators, key=lambda operator: -operator.seconds))


class TokenClock(StoppingCriteria):
    """Notes the time at each new token of `generate()`, and never stops it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: list[float] = []
        self.cpu_times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())
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

    def generate(prompt: Tensor) -> tuple[float, float, float, Any]:
        """Return the seconds to the first new token, those of each later one, their CPU time, and the cache."""
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
        per_token = [(times[-1] - times[0]) / (NEW_TOKENS - 1) for times in (clock.times, clock.cpu_times)]
        return clock.times[0] - start, *per_token, getattr(out, CACHE_NAME)

    generate(ids[:, :WARM_UP_TOKENS])
    memory = PeakMemory(device)
    reading, times, cpu_times, caches = zip(*(generate(ids) for _ in range(steps)), strict=True)
    return GenerationSpeed(
        reading_tokens_per_s=rows * tokens / statistics.median(reading),
        seconds_per_token=statistics.median(times),
        cpu_seconds_per_token=statistics.median(cpu_times),
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


MEASURES: dict[str, Callable[..., TrainingSpeed | GenerationSpeed | Profile | CheckResult | Machine]] = {
    "training": measure_training,
    "profile": profile_training,
    "generation": measure_generation,
    "machine": describe_machine,
    "compiled": check_compiled,
    "flex_model": check_flex_model,
    "flex_kernel": check_flex_kernel,
    "cached_generation": check_generation,
    "rounding": check_rounding,
    "losses": check_losses,
    "memory_plan": check_memory_plan,
}


def measure(kind: str, case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the result of a case as a JSON object. `case`: the arguments of its function, `shape` as an object."""
    shape = {"shape": ModelShape(**case["shape"])} if "shape" in case else {}
    try:
        return asdict(MEASURES[kind](**case | shape, device=device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return OUT_OF_MEMORY


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out. An illegal access to memory, which CUDA reports too, is another error."""
    words = ("DefaultCPUAllocator", "out of memory", "Cannot allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(measure(sys.argv[1], json.loads(sys.argv[2]), device)))


if __name__ == "__main__":
    run_main(main)
