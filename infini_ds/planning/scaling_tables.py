"""Tables of what it costs to divide a row over ranks, in Markdown, from the formulas and the published bandwidths.

python -m infini_ds.planning.scaling_tables                          # print them
python -m infini_ds.planning.scaling_tables --write docs/scaling.md  # put them between the markers of a document

Symbols: K ranks that share a row of T tokens, N segments of S tokens, G segments of a block for each rank, E width,
H heads, D head size.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infini_ds.distributed.entry_point import run_main
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig
from infini_ds.model.presets import preset_config
from infini_ds.planning.flops import training_flops_per_token
from infini_ds.planning.hardware import GPUS, LINKS
from infini_ds.planning.memory_estimate import Workload
from infini_ds.planning.traffic import NODE_GPUS, SequenceTraffic
from infini_ds.utils.documents import insert_between, read_document

MARKERS = "<!-- {}: written by `python -m infini_ds.planning.scaling_tables --write docs/scaling.md` -->"
END = "<!-- end -->"
SIZES = ("125m", "350m", "1.3b", "2.7b")
T, S, G, K = 1_048_576, 2_048, 4, 8
PEAK, MFU = GPUS["h100-80g"].bf16_flops, 0.4
NVLINK, INFINIBAND = (LINKS[name] for name in GPUS["h100-80g"].links)
BF16 = 2  # bytes


@dataclass(frozen=True)
class Step:
    """A training step on one row of H100s, blocks recomputed, nothing overlapped."""

    size: str
    ranks: int = K
    block: int = G
    rule: str = "linear"
    tokens: int = T

    @property
    def config(self) -> InfiniGPTNeoConfig:
        return preset_config(self.size, segment_length=S, memory_rule=self.rule)

    @property
    def work(self) -> Workload:
        schedule = BlockSchedule(segments_per_block=self.block)
        return Workload(self.config, 1, self.tokens, "bf16", schedule, checkpointing=True, sequence=self.ranks)

    @property
    def traffic(self) -> SequenceTraffic:
        return SequenceTraffic.of(self.work)

    @property
    def computing(self) -> float:
        """Seconds of a rank at MFU, which does not count recomputation, for its segments and empty ones at the end."""
        work = self.work
        tokens = work.rank_segments * work.segment_length
        return tokens * training_flops_per_token(self.config) / (PEAK * MFU)

    def exchange(self, node: int = NODE_GPUS) -> float:
        """Seconds of a step's exchanges, `node` ranks of the group on each node."""
        return self.traffic.seconds(NVLINK, INFINIBAND, node)

    def speedup(self) -> float:
        """Return how many times faster than one rank."""
        return Step(self.size, 1, self.block, self.rule, self.tokens).computing / (self.computing + self.exchange())


def cost_table() -> str:
    """What a step of each size sends, and how long that takes in a node and between nodes of one GPU."""
    rows = []
    for size in SIZES:
        step, delta = Step(size), Step(size, rule="delta")
        gathers, config = step.traffic.gathers, step.config
        seconds = [f"{x:.3f} ({x / step.computing:.1%})" for x in (step.exchange(), step.exchange(node=1))]
        shape = size, config.num_layers, config.num_heads, config.head_dim
        sent, sent_by_delta = (f"{one.traffic.sent / 1e9:.2f}" for one in (step, delta))
        exchanges = f"{gathers[0]:,}", f"{step.traffic.collectives:,}"
        rows.append([*shape, *exchanges, sent, f"{step.computing:.2f}", *seconds, sent_by_delta])
    head = "size, L, H, D, bytes of an exchange, exchanges, GB sent, s computing, s on NVLink 4, s on InfiniBand NDR"
    return _table([*head.split(", "), "GB sent, delta rules"], rows)


def ranks_table() -> str:
    """The share of the exchanges in a step, and the speed-up, against K, in nodes of 8 GPUs."""
    counts = (2, 4, 8, 16, 32, 64, 128)
    rows = []
    for tokens, size in ((T, "125m"), (T, "1.3b"), (T, "2.7b"), (32 * S, "1.3b")):
        for block in (1, 4):
            cells = []
            for ranks in counts:
                step = Step(size, ranks, block, tokens=tokens)
                share = step.exchange() / (step.computing + step.exchange())
                cells.append(f"{step.speedup():.1f} ({share:.0%})" if ranks <= step.work.segments else "")
            rows.append([f"{tokens:,}", size, block, *cells])
    return _table(["tokens", "size", "G", *(f"K = {ranks}" for ranks in counts)], rows)


def attention_table() -> str:
    """Bytes that a rank sends in the forward pass of a layer, beside what attention over the complete row needs."""
    rows = []
    for tokens in (32_768, 262_144, T):
        for ranks in (8, 16):
            step = Step("1.3b", ranks, tokens=tokens)
            E, own = step.config.hidden_size, tokens // ranks
            ring = (ranks - 1) * own * 2 * E * BF16
            ulysses = round(4 * own * E * BF16 * (ranks - 1) / ranks)
            ours = (ranks - 1) * step.traffic.gathers[0] * step.work.blocks
            megabytes = [f"{x / 1e6:,.1f}" for x in (ring, ulysses, ours)]
            rows.append([f"{tokens:,}", ranks, *megabytes, f"{ring / ours:.0f}"])
    head = "tokens, K, ring attention MB, Ulysses MB, this model MB, ring attention / this model"
    return _table(head.split(", "), rows)


TABLES: dict[str, Callable[[], str]] = {"cost": cost_table, "ranks": ranks_table, "attention": attention_table}


def _table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def insert(document: str) -> str:
    """Return the document with today's tables between their markers.

    Raises:
        UserError: a marker is missing.
    """
    for name, table in TABLES.items():
        document = insert_between(document, MARKERS.format(name), END, f"{table()}\n")
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables between a document's markers")
    args = parser.parse_args()
    if args.write is None:
        print("\n\n".join(table() for table in TABLES.values()))
    else:
        args.write.write_text(insert(read_document(args.write)))


if __name__ == "__main__":
    run_main(main)
