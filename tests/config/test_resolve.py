"""Resolving a recipe: everything that follows from it, without locks, process groups or files."""

import os
from dataclasses import FrozenInstanceError

import pytest
import torch.distributed as dist
from harness import SHAPE

from data_prep.prepare import PrepareOptions, prepare
from infini_ds.config.recipe import Recipe, load_recipe
from infini_ds.config.resolve import choose_precision, resolve
from infini_ds.config.stages import StageEnd
from infini_ds.distributed.environment import DistEnv
from infini_ds.model import BlockSchedule, MemoryRule, register_memory_rule
from infini_ds.model.linear_rule import LinearRule
from infini_ds.utils.errors import UserError

ONE = DistEnv(rank=0, local_rank=0, world_size=1, local_world_size=1)


def recipe(shards, *overrides: str) -> Recipe:
    data = [] if any(override.startswith("data.streams") for override in overrides) else [f"data.path={shards}"]
    return load_recipe(None, [*data, *SHAPE, "batch.rows=4", "batch.micro_rows=2", *overrides])


def test_all_parts_of_a_run(shards):
    run = resolve(recipe(shards, "model.segments_per_block=2", "data.seed=3"), ONE)
    assert run.sequence_length == 256 and run.precision == "fp32" and run.cache_limit is None
    assert (run.dims.world_size, run.dims.data_size, run.dims.rank) == (1, 1, 0)
    assert (run.batch_shape.rows, run.batch_shape.micro_rows, run.batch_shape.accumulation) == (4, 2, 2)
    assert run.deepspeed["train_batch_size"] == 4 and run.deepspeed["bf16"] == {"enabled": False}
    assert (run.model_config.hidden_size, run.model_config.vocab_size) == (32, 512)
    assert run.block_schedule == BlockSchedule(segments_per_block=2)
    assert [source.folder for source in run.sources] == [shards]
    assert run.data_fingerprint["data.seed"] == 3 and run.data_fingerprint["batch.rows"] == 4
    with pytest.raises(FrozenInstanceError):
        run.precision = "bf16"


def test_it_writes_nothing_and_starts_nothing(shards, tmp_path, monkeypatch):
    started = dist.is_initialized()
    files = sorted(shards.rglob("*"))
    monkeypatch.chdir(tmp_path)
    resolve(recipe(shards, f"output={tmp_path / 'runs'}"), ONE)
    assert dist.is_initialized() == started and not os.listdir(tmp_path) and sorted(shards.rglob("*")) == files


def test_ranks_differ_in_their_rank_alone(shards):
    first, last = (resolve(recipe(shards), DistEnv(rank, rank, 4, 4)) for rank in (0, 3))
    assert (first.dims.data_rank, last.dims.data_rank) == (0, 3)
    assert first.batch_shape == last.batch_shape and first.batch_shape.rank_rows == 1
    assert first.data_fingerprint == last.data_fingerprint == resolve(recipe(shards), ONE).data_fingerprint
    assert first.deepspeed == last.deepspeed


def test_streams_are_sources_with_their_share(shards):
    run = resolve(recipe(shards, f"data.streams=[{{path: {shards}, repeat: 2}}]"), ONE)
    (source,) = run.sources
    assert source.repeat == 2 and run.data_fingerprint["streams"][0]["repeat"] == 2


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Folders of rows of 64, 128 and 256 tokens, with the tokenizer of `recall:` sources."""
    folder = tmp_path_factory.mktemp("stages")
    for length in (64, 128, 256):
        source = "recall:pairs,queries=4,distance=0,documents=60"
        prepare(PrepareOptions(source=source, out=folder / str(length), sequence_length=length, workers=1), quiet=True)
    return folder


def curriculum(stages, *ends: str) -> str:
    parts = [f"{{path: {stages / length}{end}}}" for length, end in zip(("128", "256", "64"), ends, strict=True)]
    return f"data.curriculum=[{', '.join(parts)}]"


def test_stages_of_a_curriculum(stages):
    """Each has its rows, their length and number; the tokens of a step stay."""
    ends = [", steps: 10%", ", until: 0.9, recall: passkey", ""]
    choices = ["batch.tokens=1024", "batch.micro_rows=3", "validation.recall=pairs+variables"]
    asked = load_recipe(None, [curriculum(stages, *ends), *SHAPE, *choices])
    run = resolve(asked, ONE)
    assert [stage.sequence_length for stage in run.stages] == [128, 256, 64]
    assert [(s.batch_shape.rows, s.batch_shape.micro_rows) for s in run.stages] == [(8, 2), (4, 2), (16, 2)]
    assert [stage.deepspeed["train_batch_size"] for stage in run.stages] == [8, 4, 16]
    assert [stage.deepspeed["gradient_accumulation_steps"] for stage in run.stages] == [4, 2, 8]
    rows = [sum(source.rows for source in stage.sources) for stage in run.stages]
    assert [stage.first_row for stage in run.stages] == [0, rows[0], rows[0] + rows[1]]
    tasks = ("pairs", "variables")
    assert [stage.end for stage in run.stages] == [
        StageEnd(100, None, tasks), StageEnd(None, 0.9, ("passkey",)), StageEnd(None, None, tasks)
    ]  # fmt: skip
    assert (run.sequence_length, run.at_stage(2).sequence_length) == (128, 64)
    assert run.at_largest_stage().stage == 1
    assert [stage["batch.rows"] for stage in run.data_fingerprint["stages"]] == [8, 4, 16]
    plan = resolve(asked, ONE, require_data=False, device_type="cuda")
    assert [stage.sequence_length for stage in plan.stages] == [128, 256, 64]


def test_a_curriculum_that_is_not_prepared_can_be_planned(stages):
    missing = f"data.curriculum=[{{path: {stages / '64'}, steps: 5}}, {{path: /nowhere}}]"
    asked = load_recipe(None, [missing, *SHAPE, "batch.rows=4"])
    with pytest.raises(UserError, match=r"data.curriculum\[1\].path=/nowhere holds no prepared data"):
        resolve(asked, ONE, require_data=False)
    with pytest.raises(UserError, match=r"data.curriculum\[1\].path=/nowhere: no such folder .*data_prep"):
        resolve(asked, ONE)
    run = resolve(load_recipe(None, [missing, "batch.rows=4", "plan.sequence_length=512"]), ONE, require_data=False)
    assert run.sequence_length == 512 and len(run.stages) == 1


def test_stages_of_another_tokenizer_are_refused(stages, shards):
    other = f"data.curriculum=[{{path: {stages / '64'}, steps: 5}}, {{path: {shards}}}]"
    with pytest.raises(
        UserError, match=r"data.curriculum\[1\].path=.* has another tokenizer than data.curriculum\[0\]"
    ):
        resolve(load_recipe(None, [other, *SHAPE, "batch.rows=4"]), ONE)


def test_a_curriculum_replaces_the_path_of_a_file_and_is_written_and_read_again(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("data: {path: x}\nbatch: {rows: 2}\n")
    given = "data.curriculum=[{path: a, steps: 20%}, {path: b, until: 0.5, recall: passkey}, {path: c}]"
    asked = load_recipe(file, [given])
    assert asked.data.path == Recipe().data.path and len(asked.data.curriculum) == 3
    (tmp_path / "again.yaml").write_text(asked.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == asked
    assert load_recipe(tmp_path / "again.yaml", ["data.path=y"]).data.curriculum == ()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["batch.rows=3"], ["batch.rows=3 cannot be divided over 2 ranks"]),
        (["data.path=/nowhere"], ["/nowhere", "python -m data_prep"]),
        (["data.cache_limit=1GB"], ["data.cache_limit", "only copy"]),
        (["model.config.vocab_size=100"], ["100 embeddings", "512 tokens"]),
        (["model.config.hiden_size=3"], ["did you mean model.config.hidden_size?"]),
        (["model.attention=flex_attention"], ["model.attention=flex_attention needs a GPU", "model.attention=sdpa"]),
    ],
)
def test_mistakes_get_a_sentence(overrides, words, shards):
    with pytest.raises(UserError) as error:
        resolve(recipe(shards, *overrides), DistEnv(0, 0, 2, 2))
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_ranks_that_share_rows(shards):
    """Six ranks, three on each row: two data ranks, whose rows DeepSpeed counts three times."""
    runs = [resolve(recipe(shards, "parallel.sequence=3"), DistEnv(rank, rank, 6, 6)) for rank in range(6)]
    assert [(run.dims.data_rank, run.dims.sequence_rank) for run in runs] == [
        (d, s) for d in range(2) for s in range(3)
    ]
    for run in runs:
        assert (run.batch_shape.data_size, run.batch_shape.accumulation, run.batch_shape.micro_rows) == (2, 1, 2)
        config = run.deepspeed
        counted = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 6
        assert config["train_batch_size"] == counted == 3 * run.batch_shape.rows
        assert run.data_fingerprint == resolve(recipe(shards), ONE).data_fingerprint


@pytest.mark.parametrize(
    ("overrides", "ranks", "words"),
    [
        (
            ["parallel.sequence=4"],
            6,
            "parallel.sequence=4 does not divide the number of ranks, 6: give one of 1, 2, 3, 6",
        ),
        (
            ["parallel.sequence=9"],
            9,
            "parallel.sequence=9 is more than the segments of a row, 8 (256 tokens in segments",
        ),
        (
            ["parallel.sequence=2", "batch.rows=5"],
            4,
            "batch.rows=5 cannot be divided over 2 groups of parallel.sequence=2",
        ),
        (
            ["parallel.sequence=2", "model.memory_rule=whole"],
            2,
            "but model.memory_rule=whole cannot be divided over ranks",
        ),
    ],
)
def test_rows_that_cannot_be_divided_get_a_sentence(overrides, ranks, words, shards):
    register_memory_rule(Whole())
    with pytest.raises(UserError) as error:
        resolve(recipe(shards, *overrides), DistEnv(0, 0, ranks, ranks))
    assert words in str(error.value) and "\n" not in str(error.value), error.value


class Whole(LinearRule):
    """A rule that is not for divided rows."""

    name = "whole"
    write_divided = MemoryRule.write_divided


def test_another_deepspeed_file(shards, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(UserError, match=f"zero_optimization.stage=3 in deepspeed={tmp_path}/ds.json"):
        resolve(recipe(shards, f"deepspeed={tmp_path}/ds.json"), ONE)


def test_a_plan_needs_no_data_and_no_gpu(tmp_path):
    asked = recipe(tmp_path, "plan.sequence_length=512", "model.attention=flex_attention")
    run = resolve(asked, ONE, require_data=False, device_type="cuda")
    assert run.sequence_length == 512 and run.sources == () and run.data_fingerprint is None
    assert run.precision == "bf16" and run.deepspeed["bf16"] == {"enabled": True}
    assert run.deepspeed["zero_optimization"]["overlap_comm"] is True, "not the file for GPUs"
    assert run.model_config.vocab_size == 50257
    with pytest.raises(UserError, match=r"model.attention=flex_attention needs a GPU"):
        resolve(asked, ONE, require_data=False)
    with pytest.raises(UserError, match=rf"data.path={tmp_path} holds no prepared data.* plan.sequence_length=TOKENS"):
        resolve(recipe(tmp_path), ONE, require_data=False)


def test_a_plan_reads_the_data_that_is_prepared(shards):
    run = resolve(recipe(shards), ONE, require_data=False)
    assert run.sequence_length == 256 and run.model_config.vocab_size == 512 and run.data_fingerprint
    longer = resolve(recipe(shards, "plan.sequence_length=1024"), ONE, require_data=False)
    assert longer.sequence_length == 1024 and longer.model_config.vocab_size == 512
    assert resolve(recipe(shards, "plan.sequence_length=1024"), ONE).sequence_length == 256, "training reads the plan"
    missing = recipe(shards, f"data.streams=[{{path: {shards}}}, {{path: /nowhere}}]")
    with pytest.raises(UserError, match=r"data.streams\[1\].path=/nowhere holds no prepared data"):
        resolve(missing, ONE, require_data=False)


def test_precision_that_is_asked_for_is_kept():
    assert choose_precision("auto", ONE.device) == "fp32"
    assert choose_precision("bf16", ONE.device) == "bf16"
