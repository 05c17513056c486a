"""Measure the memory of a rank that shares its rows with all others: python tests/support/memory_of_ranks.py

Prints the peak of each work in bytes, as JSON.
"""

import json
from dataclasses import replace

import torch
import torch.distributed as dist

from infini_ds.benchmarks.allocator_peak import AllocatorPeak
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM, SequenceGroup
from infini_ds.model.presets import preset_config
from infini_ds.planning.memory_estimate import Workload


def tiny(**fields) -> InfiniGPTNeoConfig:
    return preset_config("tiny", **({"vocab_size": 512, "num_layers": 2, "segment_length": 32} | fields))


RECOMPUTED = Workload(
    tiny(segment_length=16),
    rows=1,
    tokens=16 * 512,
    precision="fp32",
    schedule=BlockSchedule(segments_per_block=2),
    packed=False,
    checkpointing=True,
)
KEPT = replace(RECOMPUTED, config=tiny(), tokens=32 * 64 + 5, schedule=BlockSchedule(), checkpointing=False)
WORK = {
    "recomputed": RECOMPUTED,
    "kept": KEPT,
    "kept, documents": replace(KEPT, packed=True),
    "kept, delta rule": replace(KEPT, config=tiny(memory_rule="delta")),
}


def measured_peak(work: Workload, group: SequenceGroup | None) -> int:
    """Return the peak in bytes of a forward and backward pass, without the weights."""
    batch = {"input_ids": torch.randint(work.config.vocab_size, (work.rows, work.tokens))}
    batch["labels"] = batch["input_ids"].clone()
    if work.packed:
        batch["document_ids"] = (torch.arange(work.tokens) > work.tokens // 2 + 3).long().repeat(work.rows, 1)
    model = InfiniGPTNeoForCausalLM(work.config).train()
    model.block_schedule, model.sequence_group = work.schedule, group
    if work.checkpointing:
        model.gradient_checkpointing_enable()
    with AllocatorPeak(torch.device("cpu")) as memory:
        model(**batch).loss.backward()
    return memory.peak


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = SequenceGroup(None, rank, ranks) if ranks > 1 else None
    print(json.dumps({name: measured_peak(work, group) for name, work in WORK.items()}))
