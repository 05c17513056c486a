"""One rank of a benchmark of ranks that share a row: python -m infini_ds.benchmarks.rank_worker '{"rank": ...}'

The first rank prints the result as one line of JSON. Shapes: B = 1 row, T tokens.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infini_ds.benchmarks.collective_bytes import CollectiveBytes
from infini_ds.benchmarks.contenders import ModelShape, build_contender
from infini_ds.benchmarks.peak_memory import PeakMemory
from infini_ds.benchmarks.ranks import RankSpeed
from infini_ds.benchmarks.timing import WARM_UP_TOKENS, time_call
from infini_ds.distributed.entry_point import run_main
from infini_ds.model import BlockSchedule, InfiniGPTNeoForCausalLM, SequenceGroup
from infini_ds.planning.memory_estimate import Workload
from infini_ds.planning.traffic import SequenceTraffic


def measure(rank: int, ranks: int, tokens: int, block: int | None, steps: int, shape: ModelShape) -> RankSpeed:
    """Measure a training step (forward, backward, sum of the gradients over the ranks, AdamW) on one row.

    Args:
        block: segments of a block that each rank computes, recomputed in the backward pass; None: all, kept.
    """
    device = torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")
    model, forward_backward = build_contender(f"infini:{block or 'all'}", shape, tokens, device)
    assert isinstance(model, InfiniGPTNeoForCausalLM)
    if ranks > 1:
        model.sequence_group = SequenceGroup(None, rank, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def compute(ids: Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)  # so that gradients are not part of the step's memory
        forward_backward(ids)

    def step(ids: Tensor) -> None:
        compute(ids)
        average_gradients(model, ranks)
        optimizer.step()

    torch.manual_seed(1)
    ids = torch.randint(0, shape.vocabulary, (1, tokens), device=device)
    step(ids[:, :WARM_UP_TOKENS])
    dist.barrier()
    memory, times, cpu_times = PeakMemory(device), [], []
    for _ in range(steps):
        before = time.process_time()
        times.append(time_call(lambda: step(ids), device))
        cpu_times.append(time.process_time() - before)
    peak = memory.read()
    with CollectiveBytes() as exchanged:
        compute(ids)
    with CollectiveBytes() as summed:
        average_gradients(model, ranks)
    work = Workload(
        config=shape.config(),
        rows=1,
        tokens=tokens,
        precision=shape.precision,
        schedule=BlockSchedule(segments_per_block=block),
        packed=False,
        checkpointing=block is not None,
        sequence=ranks,
    )
    return RankSpeed(
        seconds=statistics.median(times),
        cpu_seconds=statistics.median(cpu_times),
        blocks=work.blocks,
        exchanges=exchanged.calls,
        exchanged_bytes=exchanged.sent,
        formula_bytes=SequenceTraffic.of(work).sent,
        gradient_bytes=summed.sent,
        peak_memory=peak,
    )


def average_gradients(model: nn.Module, ranks: int) -> None:
    """Average the gradients over the ranks, all in one collective."""
    if ranks == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= ranks
    for gradient, part in zip(gradients, flat.split([x.numel() for x in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def main() -> None:
    case = json.loads(sys.argv[1])
    rank, ranks = case["rank"], case["ranks"]
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    if on_gpus:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)  # a rank is a core, however many there are
    store = f"file://{case.pop('store')}"
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=store, rank=rank, world_size=ranks)
    result = measure(**case | {"shape": ModelShape(**case["shape"])})
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(asdict(result)))


if __name__ == "__main__":
    run_main(main)
