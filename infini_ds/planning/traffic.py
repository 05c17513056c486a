"""Bytes that a rank sends in a training step, and how long a link takes for them, computed before a run.

Sequence parallelism exchanges, in each layer of each block, what every rank's segments add to the memory; ZeRO
exchanges gradients and weights. Bytes are those that a rank sends in a ring: for an all-gather over n ranks n - 1 times
what it contributes. `tests/benchmarks/test_ranks.py` compares them with what real collectives send.
"""

import math
from dataclasses import dataclass

from infini_ds.planning.fake_group import layer_contributions
from infini_ds.planning.hardware import COLLECTIVE_START, Link
from infini_ds.planning.memory_estimate import BYTES, Workload, ZeroSharding

NODE_GPUS = 8  # of a node whose size no recipe names: DGX and HGX nodes, and the job script for Slurm


@dataclass(frozen=True)
class SequenceTraffic:
    """What the ranks of a sequence group exchange in a step.

    Attributes:
        ranks: of a sequence group.
        gathers: bytes that a rank contributes to each all-gather of one layer and one block: of the forward pass, of
            the recomputation if there is one, and of the backward pass.
        times: layers × blocks × micro-batches of a step.
    """

    ranks: int
    gathers: tuple[int, ...]
    times: int

    @classmethod
    def of(cls, work: Workload) -> "SequenceTraffic":
        """Return the traffic of a workload; the rule is asked what it exchanges.

        The backward pass of an all-gather sums over the ranks what each has for every other one (reduce-scatter), and
        sends as many bytes.
        """
        if work.sequence == 1:
            return cls(1, (), 0)
        a_pass = layer_contributions(work.config, work.rows, work.sequence)
        passes = 2 + work.checkpointing + work.schedule.checkpoint_layers
        return cls(work.sequence, passes * a_pass, work.config.num_layers * work.blocks * work.accumulation)

    @property
    def collectives(self) -> int:
        """Exchanges of a step."""
        return len(self.gathers) * self.times

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a step."""
        return (self.ranks - 1) * sum(self.gathers) * self.times

    def seconds(self, inside: Link, between: Link, node: int = NODE_GPUS) -> float:
        """Return the seconds of all exchanges of a step, if nothing else uses the links; see `all_gather_seconds`."""
        return self.times * sum(all_gather_seconds(n, self.ranks, inside, between, node) for n in self.gathers)


def all_gather_seconds(payload: int, ranks: int, inside: Link, between: Link, node: int = NODE_GPUS) -> float:
    """Return the seconds of an all-gather to which each rank contributes `payload` bytes: a start, the hops of a ring,
    and the bytes at the published bandwidth.

    Args:
        inside: the link between the GPUs of a node; between: of a GPU to other nodes.
        node: ranks of a group on each node. Between nodes each GPU's own adapter takes its part of the ring's bytes.
    """
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / node)
    hops = (ranks - nodes) * inside.hop + (nodes - 1) * between.hop
    bandwidths = [*([inside.bandwidth] if ranks > nodes else []), *([node * between.bandwidth] if nodes > 1 else [])]
    return COLLECTIVE_START + hops + (ranks - 1) * payload / min(bandwidths)


def zero_bytes(work: Workload, sharding: ZeroSharding, parameters: int) -> int:
    """Return the bytes that ZeRO sends from a rank in a step.

    DeepSpeed 0.19 sums gradients by an all-reduce, which sends each byte twice: stage 2 those of each micro-batch,
    stage 1 once a step. Then it gathers the weights.
    """
    sums = work.accumulation if sharding.stage == 2 else 1
    return round((2 * sums + 1) * BYTES[work.precision] * parameters * (sharding.ranks - 1) / sharding.ranks)
