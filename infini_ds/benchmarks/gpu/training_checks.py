"""Checks of training as a run does it, with DeepSpeed's engine: bf16 against fp32, and memory against the plan.

Run by `infini_ds.benchmarks.worker`, one in a process.
"""

import gc
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infini_ds.benchmarks.allocator_peak import AllocatorPeak
from infini_ds.benchmarks.contenders import ModelShape
from infini_ds.benchmarks.gpu.comparison import CheckResult, Comparison
from infini_ds.benchmarks.timing import time_call
from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.deepspeed_config import deepspeed_config, default_file
from infini_ds.config.recipe import load_recipe
from infini_ds.distributed.environment import detect_environment
from infini_ds.distributed.process_group import connect
from infini_ds.model import BlockSchedule
from infini_ds.planning.flops import training_flops_per_token
from infini_ds.planning.hardware import memory_free, peak_flops
from infini_ds.planning.memory_estimate import HEADROOM, Workload, ZeroSharding, estimate_memory, largest_block
from infini_ds.training.model_builder import build_model, set_matmul_precision
from infini_ds.utils.errors import UserError

if TYPE_CHECKING:
    from infini_ds.training.engine import Engine

WORDS = 64  # of the text below, however large the vocabulary
LOSS_DIFFERENCE = 0.02  # the largest, relative, between bf16 and fp32 in each step
FALL = 0.9  # the last loss over the first: a comparison of models that do not learn would show nothing
LEAST_OF_PLAN = 0.8  # a plan that is much too high wastes a GPU
CPU_ATTEMPTS = 3  # the profiler's peak may be too high, never too low


def check_losses(shape: ModelShape, tokens: int, steps: int, block: int, device: torch.device) -> CheckResult:
    """Train in bf16, with fp32 weights in the optimizer, and in fp32: the losses of the same rows from the same start.

    `tokens`: of a row; each step has one.
    """
    losses = {}
    with connect(detect_environment(), timeout_minutes=5):
        for precision in ("bf16", "fp32"):
            work = _workload(replace(shape, precision=precision), tokens, block)
            with _engine(work, device) as (engine, _):
                losses[precision] = [_train_step(engine, _text(shape, tokens, step, device)) for step in range(steps)]
    differences = [abs(low / full - 1) for low, full in zip(losses["bf16"], losses["fp32"], strict=True)]
    largest = max(differences, key=lambda difference: float("inf") if difference != difference else difference)
    return CheckResult(
        (
            Comparison("largest difference of a step's loss", largest, LOSS_DIFFERENCE),
            Comparison("last loss over the first, fp32", losses["fp32"][-1] / losses["fp32"][0], FALL),
        ),
        {"first loss, fp32": losses["fp32"][0], "last, fp32": losses["fp32"][-1], "last, bf16": losses["bf16"][-1]},
    )


def check_memory_plan(
    shape: ModelShape, tokens: int, steps: int, block: int | None, bucket: int | None, device: torch.device
) -> CheckResult:
    """Compare the memory that steps of training take with the plan, and measure their speed.

    Args:
        steps: after the first one, which warms up.
        block: segments; None for the largest block that fits into what is free.
        bucket: elements in which gradients are reduced; None for those of DeepSpeed's JSON.
    Raises:
        UserError: by the plan not even blocks of one segment fit.
    """
    environment = detect_environment()
    limit = int(memory_free(environment) * (1 - HEADROOM))
    with connect(environment, timeout_minutes=5):
        for _ in range(1 if device.type == "cuda" else CPU_ATTEMPTS):
            work, times = _workload(shape, tokens, block), []
            with AllocatorPeak(device) as memory, _engine(work, device, bucket, limit) as (engine, planned):
                for step in range(steps + 1):
                    ids = _text(shape, tokens, step, device)
                    times.append(time_call(partial(_train_step, engine, ids), device))
                block_segments = engine.module.block_schedule.segments_per_block
            share = memory.peak / planned
            if share <= 1 + HEADROOM:
                break
    speed, flops = tokens / statistics.median(times[1:]), training_flops_per_token(shape.config())
    figures = {
        "planned, GiB": planned / 2**30,
        "allocator's peak, GiB": memory.peak / 2**30,
        "segments in a block": float(block_segments or work.segments),
        "tokens/s": speed,
        "MFU": speed * flops / peak_flops(device, shape.precision),
    }
    return CheckResult((Comparison("peak over the plan", share, 1 + HEADROOM, at_least=LEAST_OF_PLAN),), figures)


def _workload(shape: ModelShape, tokens: int, block: int | None) -> Workload:
    schedule = BlockSchedule(segments_per_block=block)
    return Workload(shape.config(), 1, tokens, shape.precision, schedule, packed=False, checkpointing=True)


@contextmanager
def _engine(
    work: Workload, device: torch.device, bucket: int | None = None, limit: int | None = None
) -> Iterator[tuple["Engine", int]]:
    """Build the engine of one rank, and yield it with the bytes of the plan.

    `limit`: of memory, for blocks as large as fit where the workload names no size.
    """
    from infini_ds.training.engine import Engine  # imports DeepSpeed, which takes seconds of every other process too

    options = ["batch.rows=1", "steps=1000", "schedule.warmup_steps=0", "optimizer.learning_rate=1e-3"]
    recipe = load_recipe(None, [*options, "model.gradient_checkpointing=true", f"precision={work.precision}"])
    config = deepspeed_config(default_file(device.type), recipe, BatchShape(1, 1, 1), work.precision)
    if bucket is not None:
        config["zero_optimization"]["reduce_bucket_size"] = bucket
    sharding = ZeroSharding.from_json(config, ranks=1)
    if work.schedule.segments_per_block is None and limit is not None:
        block = largest_block(work, sharding, limit)
        if block is None:
            needed = estimate_memory(work.in_blocks_of(1), sharding).peak
            raise UserError(f"a step needs {needed / 2**30:.1f} GiB, and {limit / 2**30:.1f} GiB may be taken")
        work = work.in_blocks_of(block)
    planned = estimate_memory(work, sharding)
    set_matmul_precision(work.precision, device)
    engine = Engine(build_model(recipe, work.config, work.schedule), recipe, config)
    engine.module.train()
    yield engine, planned.peak + (planned.host if device.type == "cpu" else 0)
    engine.destroy()
    del engine
    gc.collect()


def _train_step(engine: "Engine", ids: Tensor) -> float:
    loss = engine(input_ids=ids, labels=ids).loss
    assert loss is not None
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def _text(shape: ModelShape, tokens: int, step: int, device: torch.device) -> Tensor:
    """Return a row (1, T) of text that a model learns fast: each token depends on the one before, up to some noise."""
    generator = torch.Generator().manual_seed(step)
    words = min(WORDS, shape.vocabulary)
    following = torch.randperm(words, generator=torch.Generator().manual_seed(-1))
    noise = torch.rand(tokens, generator=generator) < 0.1
    random = torch.randint(words, (tokens,), generator=generator)
    chain = [int(random[0])]
    for is_noise, token in zip(noise[1:].tolist(), random[1:].tolist(), strict=True):
        chain.append(token if is_noise else int(following[chain[-1]]))
    return torch.tensor([chain], device=device)
