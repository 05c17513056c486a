"""Plans of the shipped recipes and of what does not fit, as launch/plan.py prints them."""

import re

import pytest
from harness import ROOT, call_script

from infini_ds.config.lr_schedule import gate_reach
from infini_ds.config.recipe import load_recipe
from infini_ds.model.presets import PRESETS

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
