"""Plans of the shipped recipes and of what does not fit, as launch/plan.py prints them."""

import re
from itertools import pairwise

import gated_decay  # noqa: F401  registers its memory rule
import pytest
from harness import ROOT, call_script

from infini_ds.config.lr_schedule import gate_reach
from infini_ds.config.recipe import load_recipe
from infini_ds.model.presets import PRESETS
from infini_ds.planning.plan import make_plan
from infini_ds.planning.step_trace import run_on_fake_tensors

SIZED = [path for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml")) if load_recipe(path).plan.gpu]


@pytest.mark.parametrize("path", SIZED, ids=lambda path: path.stem)
def test_shipped_recipe_fits_the_gpu_that_it_names(path):
    recipe = load_recipe(path)
    assert make_plan(recipe).fits
    assert gate_reach(recipe) >= 4  # sigmoid(4) = 0.98: from an even mix to memory alone, or to none
    assert recipe.plan.gpu in path.read_text().splitlines()[0]


def test_the_script_prints_the_plan():
    shown = call_script("launch/plan.py", "--config", "launch/recipes/1.3b.yaml").stdout
    for words in (
        "1.3b on 8 x a100-80g",
        "1,315,576,192",
        "8 ranks x 4 x 1 rows of 32,768 tokens",
        "recomputed block by block, bf16",
        "days at 40% MFU",
        "activations and loss",
        "reduce buckets",
        "What fits",
        "(headroom: 10% of 79.3): it fits.",
    ):
        assert words in shown


def test_a_row_that_ranks_share_takes_the_memory_of_a_rank_s_part():
    """8 ranks, 4 on each row, plan as 2 ranks with rows of a quarter, but for ZeRO's shares, the tokens, the complete
    row's ids, and what the ranks exchange.
    """
    choices = ["plan.sequence_length=65536", "batch.tokens=null", "batch.rows=8"]
    recipe = load_recipe(ROOT / "launch" / "recipes" / "125m.yaml", [*choices, "plan.gpus=8", "parallel.sequence=4"])
    quarter = load_recipe(
        ROOT / "launch" / "recipes" / "125m.yaml", [*choices, "plan.gpus=2", "plan.sequence_length=16384"]
    )
    shared, alone = make_plan(recipe), make_plan(quarter)
    assert shared.work.rank_segments == alone.work.segments and shared.work.block_segments == alone.work.block_segments
    assert shared.sharding.ranks == 8 and shared.tokens == 4 * alone.tokens
    bytes_of_shared, bytes_of_alone = (plan.estimate.computing["activations and loss"] for plan in (shared, alone))
    ids = 4 * 8 * (65_536 - 16_384) * 6  # rows; ids, labels and documents, in two layouts
    exchanged = 12 * 4 * 4 * 12 * (64 * 64 + 64) * 4  # layers, rows, ranks
    assert bytes_of_alone < bytes_of_shared < bytes_of_alone + ids + 2 * exchanged
    assert shared.days == pytest.approx(alone.days)  # four times the tokens on four times the devices


def test_there_is_a_recipe_for_every_size():
    assert {load_recipe(path).model.preset for path in SIZED} == set(PRESETS) - {"tiny", "study-tiny"}


def test_a_plan_needs_few_runs_on_fake_tensors():
    """Each takes about a second, and a plan has to be there in about ten."""
    before = run_on_fake_tensors.cache_info().misses
    other_length = ["plan.sequence_length=16384", "plan.gpu=l40s-48g"]  # of which no other test has left traces
    plan = make_plan(load_recipe(ROOT / "launch" / "recipes" / "1.3b.yaml", other_length))
    blocks = plan.fitting_blocks()
    assert plan.fits and [block.rows for block in blocks] == [1, 2, 4, 8]
    assert 8 <= run_on_fake_tensors.cache_info().misses - before <= 12
    *fitting, last = blocks
    assert last.segments is None and last.peak is None
    for smaller, larger in pairwise(fitting):
        assert larger.segments <= smaller.segments
    assert all(0.5 * plan.memory_limit < block.peak <= plan.memory_limit for block in fitting)


LARGE = ["model.preset=1.3b", "model.segment_length=2048", "batch.rows=4", "batch.micro_rows=4"]


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        ("a100-80g", ["model.gradient_checkpointing=true", "model.segments_per_block="]),
        ("rtx4090-24g", ["batch.micro_rows=1", "deepspeed=ds_configs/zero2_offload.json"]),
    ],
)
def test_what_does_not_fit_gets_a_remedy_that_does(gpu, words):
    arguments = [*LARGE, "--sequence-length", "8192", "--gpu", gpu]
    sentence = call_script("launch/plan.py", *arguments, code=1).stdout.splitlines()[-1]
    assert all(word in sentence for word in ["does not fit; try", *words])
    remedy = sentence.split("; try ")[1].removesuffix(".").split()
    assert "it fits." in call_script("launch/plan.py", *arguments, *remedy).stdout


def test_days_follow_from_flops():
    """33m on one RTX 4090: the tokens of the recipe, about 6 FLOPs for each parameter, 40% of 165 TFLOP/s."""
    plan = make_plan(load_recipe(ROOT / "launch" / "recipes" / "33m.yaml"))
    assert plan.days == pytest.approx(6 * 68.5e6 * 1.363e9 / (0.4 * 165e12) / 86_400, rel=0.2)


def test_a_rule_that_the_project_does_not_know_is_planned():
    """Its state and its parameters are in the plan. The data is not prepared, and this machine has no such GPU."""
    arguments = ["model.preset=tiny", "model.segment_length=64", "batch.rows=2", "data.path=nowhere"]
    arguments += ["--sequence-length", "256", "--gpu", "l4-24g"]
    plans = []
    for rule in ("linear", "gated_decay"):
        shown = call_script("launch/plan.py", *arguments, f"model.memory_rule={rule}").stdout
        assert "it fits." in shown
        plans.append(int(re.search(r"parameters\D+([\d,]+)", shown)[1].replace(",", "")))
    assert plans[1] - plans[0] == 4 * 4  # one for each of four heads of four layers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "a100", "--sequence-length", "512"], ["plan.gpu=a100 is unknown", "a100-", "--memory"]),
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
