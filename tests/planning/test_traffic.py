"""What ranks that share a row send, counted by hand, and what a plan says of it."""

from dataclasses import replace

import pytest
from harness import ROOT, call_script, outputs_of_ranks

from infini_ds.config.recipe import load_recipe
from infini_ds.model import BlockSchedule, MemoryRule, register_memory_rule
from infini_ds.model.linear_rule import LinearRule
from infini_ds.model.presets import preset_config
from infini_ds.planning.fake_group import layer_contributions
from infini_ds.planning.hardware import GPUS, LINKS
from infini_ds.planning.memory_estimate import Workload, ZeroSharding
from infini_ds.planning.plan import make_plan
from infini_ds.planning.scaling_tables import insert
from infini_ds.planning.traffic import SequenceTraffic, all_gather_seconds, zero_bytes
from infini_ds.utils.errors import UserError

# B = 3 rows, 16 heads of size 128.
CONTRIBUTIONS = {
    "linear": (3 * 16 * (128 * 128 + 128) * 4,),  # M and z
    "delta": (3 * 16 * 128 * 4, 3 * 16 * 2 * 128 * 128 * 4),  # z, and then what a span does to M: two matrices
    "delta_paper": (3 * 16 * 128 * 4, 3 * 16 * 2 * 128 * 128 * 4),
}


@pytest.mark.parametrize("rule", CONTRIBUTIONS)
def test_what_a_rank_gives_to_an_exchange(rule):
    config = preset_config("1.3b", memory_rule=rule, segment_length=2048)
    assert layer_contributions(config, 3, 8) == CONTRIBUTIONS[rule]
    assert layer_contributions(config, 3, 2) == CONTRIBUTIONS[rule]


WORK = Workload(
    preset_config("tiny", segment_length=64),  # 4 layers, 4 heads of 32
    rows=2,
    tokens=64 * 48,
    precision="fp32",
    schedule=BlockSchedule(segments_per_block=3),
    accumulation=5,
    checkpointing=True,
    sequence=4,
)
GIVEN = 2 * 4 * (32 * 32 + 32) * 4


def test_the_bytes_of_a_step():
    """Blocks of 4 ranks x 3 segments: 4 of them. Each layer exchanges forward, again, and backward."""
    traffic = SequenceTraffic.of(WORK)
    assert WORK.blocks == 4 and traffic.gathers == (GIVEN,) * 3
    assert traffic.sent == 3 * GIVEN * (3 * 4 * 4 * 5)  # to 3 ranks; passes, layers, blocks, micro-batches
    assert traffic.collectives == 3 * 4 * 4 * 5
    layers_too = replace(WORK, schedule=replace(WORK.schedule, checkpoint_layers=True))
    assert SequenceTraffic.of(layers_too).sent == traffic.sent * 4 // 3
    assert SequenceTraffic.of(replace(WORK, checkpointing=False)).sent == traffic.sent * 2 // 3
    assert SequenceTraffic.of(replace(WORK, sequence=1)).sent == 0


def test_the_bytes_do_not_depend_on_the_length_of_a_row():
    """At a fixed number of blocks."""
    longer = replace(WORK, tokens=16 * WORK.tokens).in_blocks_of(48)
    assert longer.blocks == WORK.blocks and SequenceTraffic.of(longer) == SequenceTraffic.of(WORK)


def test_segments_of_a_row_that_its_ranks_do_not_divide():
    """49 segments are 13 for each of 4 ranks, three of them empty: 5 blocks of 3."""
    ragged = replace(WORK, tokens=64 * 48 + 1)
    assert (ragged.rank_segments, ragged.blocks, ragged.block_segments) == (13, 5, 3)
    assert ragged.in_blocks_of(100).block_segments == 13 and ragged.in_blocks_of(100).blocks == 1


def test_seconds_of_an_all_gather():
    """NCCL's start, its hops, and the bytes at the bandwidth; between nodes all adapters of a node share the ring."""
    inside, between = LINKS["NVLink 4"], LINKS["InfiniBand NDR"]
    assert all_gather_seconds(10**6, 1, inside, between) == 0
    node = 8.4e-6 + 7 * 3.4e-6 + 7e6 / 450e9
    assert all_gather_seconds(10**6, 8, inside, between) == pytest.approx(node)
    two = 8.4e-6 + 30 * 3.4e-6 + 14e-6 + 31e6 / 450e9
    assert all_gather_seconds(10**6, 32, inside, between, node=16) == pytest.approx(two)
    four = 8.4e-6 + 28 * 3.4e-6 + 3 * 14e-6 + 31e6 / 400e9
    assert all_gather_seconds(10**6, 32, inside, between) == pytest.approx(four)
    alone = 8.4e-6 + 7 * 14e-6 + 7e6 / 50e9
    assert all_gather_seconds(10**6, 8, inside, between, node=1) == pytest.approx(alone)


def test_each_gpu_has_links_with_a_source():
    for gpu in GPUS.values():
        inside, between = (LINKS[name] for name in gpu.links)
        assert inside.bandwidth > between.bandwidth and inside.hop < between.hop
    assert all("B/s" in link.source or "Gb/s" in link.source for link in LINKS.values())


def test_the_bytes_of_zero():
    """Gradients are summed for each micro-batch by an all-reduce, twice their size; weights are gathered once."""
    sharding = ZeroSharding(ranks=4)
    assert zero_bytes(WORK, sharding, 1000) == (2 * 5 + 1) * 4 * 1000 * 3 // 4
    assert zero_bytes(WORK, replace(sharding, stage=1), 1000) == 3 * 4 * 1000 * 3 // 4
    assert zero_bytes(WORK, replace(sharding, ranks=1), 1000) == 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_zero_sends_what_the_formula_says(ranks):
    """Counted at the collectives of a real step of DeepSpeed; the rest is norms, and padding of shards."""
    for output in outputs_of_ranks(ranks, "zero_traffic"):
        counted, formula = map(int, output.partition("sent ")[2].split()[:2])
        assert formula <= counted < 1.01 * formula


LONG = ["model.segment_length=2048", "model.gradient_checkpointing=true", "model.segments_per_block=1"]
LONG += ["model.preset=33m", "batch.rows=4", "deepspeed=ds_configs/zero2_one_gpu.json", "data.path=nowhere"]


def test_a_row_that_does_not_fit_one_rank_is_divided():
    """8 million tokens: what is kept between blocks fills one rank, and larger blocks have more activations."""
    arguments = [*LONG, "plan.sequence_length=8388608", "plan.memory=3.1", "plan.gpus=4"]
    plan = make_plan(load_recipe(None, arguments))
    remedy = plan.remedy().split()
    assert not plan.fits and remedy[:2] == ["batch.micro_rows=1", "parallel.sequence=2"]
    divided = make_plan(load_recipe(None, [*arguments, *remedy]))
    assert divided.fits and divided.run.dims.data_size == 2 and divided.run.batch_shape.accumulation == 2


class Undivided(LinearRule):
    """A rule that nobody has taught to compute a part of a row."""

    name = "undivided"
    write_divided = MemoryRule.write_divided


register_memory_rule(Undivided())


def test_a_rule_that_cannot_be_divided_gets_no_such_remedy():
    plan = make_plan(load_recipe(None, [*LONG, "plan.sequence_length=4096", "plan.memory=3", "plan.gpus=4"]))
    divided = list(plan._divided(plan.work, [], 4))
    assert [words.split()[0] for words in divided] == ["parallel.sequence=2"]  # of two segments
    work = replace(plan.work, config=preset_config("33m", memory_rule="undivided", segment_length=2048))
    assert list(plan._divided(work, [], 4)) == []


def test_the_script_prints_what_is_sent():
    """For 8 ranks that share a row: 24 layers x 11 blocks, 3 exchanges, to 7 ranks."""
    blocks = ["model.segments_per_block=6", "--sequence-length", "1048576"]
    shown = call_script("launch/plan.py", "--config", "launch/recipes/1.3b-1m.yaml", *blocks).stdout
    text = " ".join(shown.replace("│", " ").split())
    sent = 24 * 11 * 7 * 3 * 1_056_768
    for words in (
        "8 ranks (8 on each row) x 1 x 1 rows of 1,048,576 tokens",
        "8 ranks x 6 of 512 segments of 2048",
        f"{sent / 1e9:.3g} GB a step by each rank: 264 layers of blocks x 7 other ranks x {3 * 1_056_768:,} bytes",
        "on NVLink 3, if nothing overlaps",
        "6.91 GB a step by each rank: gradients and weights",
    ):
        assert words in text


@pytest.mark.parametrize("name", ["1.3b-1m", "2.7b-1m"])
def test_the_plan_of_a_million_tokens(name):
    """Rows are divided over all ranks, and the exchanges take a few percent of a step."""
    plan = make_plan(load_recipe(ROOT / "launch" / "recipes" / f"{name}.yaml"))
    assert plan.run.sequence_length == 2**20 and plan.run.dims.data_size == 1
    assert plan.work.sequence == plan.run.dims.world_size == plan.sequence_traffic.ranks
    assert 0 < plan.sequence_traffic.seconds(*plan.device.links) < 0.1 * plan.step_seconds


def test_tables_of_the_document_are_todays():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert insert(text) == text, "run python -m infini_ds.planning.scaling_tables --write docs/scaling.md"
    with pytest.raises(UserError, match="does not have the lines <!-- cost"):
        insert("no markers")
