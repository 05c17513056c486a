"""The plan of a run, and what it says about memory held against what real steps take."""

import gc
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from harness import ROOT, call_script, environment, join_ranks, pretrain
from reference import split_schedule
from torch.profiler import ProfilerActivity, profile

from infini_ds.config.batch_shape import BatchShape
from infini_ds.config.deepspeed_config import deepspeed_config
from infini_ds.config.lr_schedule import gate_reach
from infini_ds.config.recipe import load_recipe
from infini_ds.distributed.environment import detect_environment
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.model.presets import PRESETS, preset_config
from infini_ds.planning.hardware import memory_free
from infini_ds.planning.memory_estimate import Workload, ZeroSharding, estimate_memory, parameters
from infini_ds.training.model_builder import fitting_block
from infini_ds.utils.errors import UserError

SMALL_BUCKET = 50_000  # elements: DeepSpeed's buffer should not hide the rest


def peak_of_a_step(work: Workload, bucket: int) -> int:
    """Bytes at the peak of model, engine and two real optimizer steps: what torch's allocator reported to the profiler,
    temporaries inside of operators included, whatever the process's libraries and the C library's heap hold besides.
    """
    from infini_ds.training.engine import Engine

    shape = BatchShape(work.rows * work.accumulation, 1, work.rows)
    recipe = load_recipe(None, [f"batch.rows={shape.rows}"])
    join_ranks(detect_environment())
    ds_config = deepspeed_config(ROOT / "ds_configs" / "zero2_cpu.json", recipe, shape, work.precision)
    ds_config["zero_optimization"]["reduce_bucket_size"] = bucket
    batch = {"input_ids": torch.randint(work.config.vocab_size, (work.rows, work.tokens))}
    batch["labels"] = batch["input_ids"].clone()
    if work.packed:
        batch["document_ids"] = (torch.arange(work.tokens) > work.tokens // 2 + 3).long().repeat(work.rows, 1)
    gc.collect()  # nothing of an earlier test may be freed while we count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model = InfiniGPTNeoForCausalLM(work.config).train()
        model.block_schedule = work.schedule
        if work.checkpointing:
            model.gradient_checkpointing_enable()
        engine = Engine(model, recipe, ds_config)
        for micro_batch in range(1, 2 * work.accumulation + 1):
            gc.collect()  # when Python finds garbage in cycles should not play a part
            loss = engine(**batch).loss
            engine.backward(loss)
            if micro_batch % work.accumulation == 0:
                engine.step()
    engine._engine.destroy()
    held, in_use, peak = {}, 0, 0
    for _, size, pointer in sorted(allocations(profiled.profiler.kineto_results.experimental_event_tree())):
        in_use -= held.pop(pointer, 0)  # before it is given out again too: the profiler misses some frees
        if size > 0:
            held[pointer] = size
            in_use += size
        peak = max(peak, in_use)
    return peak


def allocations(events) -> list[tuple[int, int, int]]:
    """(time, bytes, pointer), bytes negative where memory was given back, of the profiler's tree of events."""
    found = []
    for event in events:
        if event.tag.name == "Allocation":
            found.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr))
        found += allocations(event.children)
    return found


def tiny(**fields):
    return preset_config("tiny", **({"vocab_size": 512, "num_layers": 2, "segment_length": 32} | fields))


WORK = Workload(tiny(), rows=1, tokens=512, precision="fp32", packed=False, checkpointing=True)


CHANGES = {
    "all at once": {},
    "blocks of 8": {"segments_per_block": 8, "tokens": 2048},
    "blocks of 4": {"segments_per_block": 4},
    "blocks of 1": {"segments_per_block": 1, "rows": 2, "tokens": 256},
    "blocks of 1, one row": {"segments_per_block": 1, "config": tiny(segment_length=128)},
    "width 192": {"segments_per_block": 4, "rows": 2, "config": tiny(hidden_size=192)},
    "width 320": {"segments_per_block": 2, "rows": 4, "tokens": 256, "config": tiny(hidden_size=320)},
    "eight layers": {"segments_per_block": 4, "config": tiny(num_layers=8)},
    "two micro-batches": {"segments_per_block": 4, "accumulation": 2},
    "two micro-batches, bf16": {"segments_per_block": 4, "accumulation": 2, "precision": "bf16"},
    "large bucket": {"segments_per_block": 2, "config": tiny(segment_length=16)},
    "states offloaded": {"segments_per_block": 1, "rows": 2, "offload_states": True},
    "everything kept": {"segments_per_block": 8, "checkpointing": False},
    "everything kept, blocks of 1": {"segments_per_block": 1, "checkpointing": False},
    "everything kept, one block": {"checkpointing": False, "config": tiny(num_layers=6)},
    "everything kept, large bucket": {"checkpointing": False},
    "documents": {"segments_per_block": 8, "packed": True},
    "documents, ragged": {"segments_per_block": 8, "packed": True, "rows": 2, "tokens": 470},
    "delta rule, ragged": {"segments_per_block": 8, "tokens": 470, "config": tiny(memory_rule="delta")},
    "delta rule, documents": {"packed": True, "rows": 2, "config": tiny(memory_rule="delta")},
    "layers": {"segments_per_block": 8, "checkpoint_layers": True, "config": tiny(num_layers=4)},
    "layers, delta rule": {"rows": 2, "checkpoint_layers": True, "config": tiny(memory_rule="delta", num_layers=4)},
    "bf16": {"segments_per_block": 8, "precision": "bf16", "packed": True},
    "bf16, large bucket": {"segments_per_block": 1, "tokens": 128, "precision": "bf16"},
    "bf16, layers": {"precision": "bf16", "checkpoint_layers": True, "config": tiny(num_layers=4)},
    "rotary": {"segments_per_block": 8, "config": tiny(hidden_size=192, position_embedding="rotary")},
    "rotary, bf16": {"rows": 2, "precision": "bf16", "config": tiny(position_embedding="rotary")},
    "large vocabulary": {"segments_per_block": 1, "config": tiny(vocab_size=8192)},
    "two chunks": {"rows": 2, "tokens": 768, "config": tiny(vocab_size=8192, hidden_size=64)},
    "two chunks, bf16": {"rows": 2, "tokens": 768, "precision": "bf16", "config": tiny(vocab_size=8192)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_estimate_is_near_the_measured_peak(name):
    schedule, changes = split_schedule(CHANGES[name])
    work = replace(WORK, schedule=schedule, **changes)
    bucket = 1_000_000 if "large bucket" in name else SMALL_BUCKET  # the large one holds all gradients
    found = estimate_memory(work, ZeroSharding(ranks=1, bucket=bucket))
    estimate = found.peak + found.host  # on a CPU they are one memory
    measured = peak_of_a_step(work, bucket)
    for _ in range(2):  # a free that the profiler missed makes a peak too high, never too low
        if estimate < 0.95 * measured:
            measured = min(measured, peak_of_a_step(work, bucket))
    standing = found.computing["weights"] + found.computing["optimizer"]
    above = (estimate - standing) / (measured - standing) - 1
    print(f"estimate {estimate / measured - 1:+.1%}, without weights and optimizer {above:+.1%}")
    assert -0.15 <= above <= 0.15


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("position_embedding", ["segment", "rotary"])
def test_parameters_are_counted_exactly(name, position_embedding):
    config = preset_config(name, position_embedding=position_embedding)
    with torch.device("meta"):
        model = InfiniGPTNeoForCausalLM(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters())


def test_auto_takes_the_largest_block_that_fits_and_changes_no_loss(runs, shards, tmp_path, capsys):
    choices = ["model.segments_per_block=auto", "model.gradient_checkpointing=true", "checkpoint.every=4"]
    pretrain(shards, tmp_path, "auto", *choices, "steps=4")  # the warm-up, where the number of steps plays no part
    assert "in segments of 32, 8 at once" in capsys.readouterr().out  # all of a row of 256 tokens
    losses = [
        [line["train/loss"] for line in read_metrics(run) if "train/loss" in line][:4]
        for run in (tmp_path / "auto", runs / "one")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


LONG = replace(WORK, tokens=2_000)
ONE_RANK = ZeroSharding(ranks=1, bucket=SMALL_BUCKET)


def peak_in_blocks_of(segments: int, rows: int) -> int:
    return estimate_memory(replace(LONG, rows=rows).in_blocks_of(segments), ONE_RANK).peak


def test_the_largest_block_fits_and_twice_as_much_does_not():
    join_ranks(detect_environment())
    free = memory_free(detect_environment())
    rows = free // peak_in_blocks_of(8, rows=1)  # of a batch with which about 8 segments fill what this machine has
    chosen = fitting_block(replace(LONG, rows=rows), ONE_RANK, detect_environment())
    assert peak_in_blocks_of(chosen, rows) < free < peak_in_blocks_of(2 * chosen, rows)
    with pytest.raises(UserError, match=r"even blocks of one segment need .* lower batch.micro_rows="):
        fitting_block(replace(LONG, rows=1000 * rows), ONE_RANK, detect_environment())


RANK = """
import sys, torch.distributed as dist
from dataclasses import replace
from infini_ds.training.model_builder import fitting_block
from infini_ds.distributed.environment import DistEnv
from test_plan import LONG, ONE_RANK

rank, neighbours, rows = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[4]}", rank=rank, world_size=2)
print("chosen", fitting_block(replace(LONG, rows=rows), ONE_RANK, DistEnv(rank, 0, 2, neighbours)))
"""


def test_all_ranks_choose_the_same_block(tmp_path):
    """One rank has a node to itself, the other shares its own with three more: the smaller room decides."""
    free = memory_free(detect_environment())
    rows = free // peak_in_blocks_of(24, rows=1)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), neighbours, str(rows), str(tmp_path / "meeting")],
            cwd=ROOT,
            env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests' / 'support'}:{ROOT / 'tests' / 'planning'}"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, neighbours in enumerate("14")
    ]
    first, second = (int(re.search(r"chosen (\d+)", rank.communicate(timeout=120)[0])[1]) for rank in ranks)
    assert first == second and peak_in_blocks_of(first, rows) < free / 4 < peak_in_blocks_of(2 * first, rows)


SIZED = [path for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml")) if load_recipe(path).plan.gpu]


@pytest.mark.parametrize("path", SIZED, ids=lambda path: path.stem)
def test_shipped_recipe_fits_the_card_that_it_names(path):
    recipe = load_recipe(path)
    assert "it fits." in call_script("launch/plan.py", "--config", path).stdout
    assert gate_reach(recipe) >= 4  # sigmoid(4) = 0.98: from half memory to all of it, or to none
    assert recipe.plan.gpu in path.read_text().splitlines()[0]


def test_there_is_a_recipe_for_every_size():
    assert {load_recipe(path).model.preset for path in SIZED} == set(PRESETS) - {"tiny", "study-tiny"}


LARGE = ["model.preset=1.3b", "model.segment_length=2048", "batch.rows=32", "batch.micro_rows=4"]


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("a100-80g", ["model.gradient_checkpointing=true", "model.segments_per_block="]),
        ("rtx4090-24g", ["batch.micro_rows=1", "deepspeed=ds_configs/zero2_offload.json"]),
    ],
)
def test_what_does_not_fit_gets_a_remedy_that_does(card, words):
    arguments = [*LARGE, "--sequence-length", "32768", "--gpu", card]
    sentence = call_script("launch/plan.py", *arguments, code=1).stdout.splitlines()[-1]
    assert all(word in sentence for word in ["does not fit; try", *words])
    remedy = sentence.split("; try ")[1].removesuffix(".").split()
    assert "it fits." in call_script("launch/plan.py", *arguments, *remedy).stdout


def test_days_follow_from_operations():
    """33m on one RTX 4090: the tokens of the recipe, about 6 operations a parameter, 40% of 165 TFLOP/s."""
    shown = call_script("launch/plan.py", "--config", "launch/recipes/33m.yaml").stdout
    days = float(re.search(r"days at 40% MFU\D+([\d.]+)", shown)[1])
    assert days == pytest.approx(6 * 68.5e6 * 1.363e9 / (0.4 * 165e12) / 86_400, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "a100", "--sequence-length", "512"], ["--gpu a100 is not known", "a100-", "--memory"]),
        (["--gpu", "H100", "--sequence-length", "512"], ["did you mean h100-80g"]),
        ([], ["data.path=nowhere", "--sequence-length"]),
        (["--gpu", "l4-24g", "--sequence-length", "0"], ["plan.sequence_length=0"]),
        (["--gpu", "l4-24g", "--sequence-length", "512", "--gpus", "3"], ["cannot be divided over 3 ranks"]),
        (["--memory", "-1", "--sequence-length", "512"], ["plan.memory=-1"]),
    ],
)
def test_mistakes_get_a_sentence(arguments, words):
    error = call_script("launch/plan.py", "data.path=nowhere", "batch.rows=4", *arguments, code=2).stderr
    assert error.startswith("error: ") and all(word in error for word in words)
