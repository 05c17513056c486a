"""Count what DeepSpeed's ZeRO sends in a step, as one of several ranks: python tests/support/zero_traffic.py

Prints the bytes, and the bytes of the formula.
"""

import torch
from harness import ROOT, join_ranks

from infini_ds.benchmarks.collective_bytes import CollectiveBytes
from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.deepspeed_config import deepspeed_config
from infini_ds.config.recipe import load_recipe
from infini_ds.distributed.environment import detect_environment
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.model.presets import preset_config
from infini_ds.planning.memory_estimate import Workload, ZeroSharding, parameters
from infini_ds.planning.traffic import zero_bytes
from infini_ds.training.engine import Engine

ACCUMULATION = 3

if __name__ == "__main__":
    environment = detect_environment()
    join_ranks(environment)
    ranks = environment.world_size
    config = preset_config("tiny", vocab_size=512, segment_length=32)
    shape = BatchShape(rows=ranks * ACCUMULATION, data_size=ranks, micro_rows=1)
    recipe = load_recipe(None, [f"batch.rows={shape.rows}"])
    ds_config = deepspeed_config(ROOT / "ds_configs" / "zero2_cpu.json", recipe, shape, "fp32")
    engine = Engine(InfiniGPTNeoForCausalLM(config).train(), recipe, ds_config)
    ids = torch.zeros(1, 64, dtype=torch.long)

    def step() -> None:
        for _ in range(ACCUMULATION):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    step()
    with CollectiveBytes() as counted:
        step()
    work = Workload(config, 1, 64, "fp32", accumulation=ACCUMULATION)
    print("sent", counted.sent, zero_bytes(work, ZeroSharding.from_json(ds_config, ranks), parameters(config)))
