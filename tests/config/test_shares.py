"""Numbers of steps as shares of the run: what they come to, and that shipped recipes keep their numbers."""

import pytest
from harness import ROOT

from infini_ds.config.lr_schedule import factor
from infini_ds.config.recipe import Recipe, ScheduleSection, load_recipe
from infini_ds.utils.errors import UserError


def in_steps(recipe: Recipe) -> tuple[int, int, int, int]:
    """Return the steps of the warm-up and of the decay, and those between validations and between checkpoints."""
    steps, schedule = recipe.steps, recipe.schedule
    sections = recipe.validation, recipe.checkpoint
    return schedule.warmup(steps), schedule.decay(steps), *(section.interval(steps) for section in sections)


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("tiny-cpu", 2000, (100, 0, 500, 500)),
        ("tiny-cpu", 12, (0, 0, 3, 3)),
        ("tiny-cpu", 1, (0, 0, 1, 1)),
        ("tiny-cpu", 501, (25, 0, 126, 126)),
        ("tiny-gpu", 1000, (100, 0, 250, 500)),
        ("tiny-gpu", 12, (1, 0, 3, 6)),
        ("books-cpu", 300, (20, 0, 100, 100)),
        ("books-cpu", 7, (0, 0, 3, 3)),
    ],
)
def test_shares_of_the_shipped_recipes(name, steps, expected):
    file = ROOT / "launch" / "recipes" / f"{name}.yaml"
    assert in_steps(load_recipe(file, [f"steps={steps}"])) == expected


def test_a_schedule_of_shares_is_that_of_its_steps():
    for kind in ("cosine", "wsd", "constant"):
        shares = ScheduleSection(kind=kind, warmup_steps="12.5%", decay_steps="20%")
        absolute = ScheduleSection(kind=kind, warmup_steps=30, decay_steps=48)
        assert all(factor(shares, 240, step) == factor(absolute, 240, step) for step in range(241))


def test_all_shares_of_a_short_run_fit_into_it():
    halves = ["batch.rows=1", "schedule.kind=wsd", "schedule.warmup_steps=50%", "schedule.decay_steps=50%"]
    for steps in range(1, 12):
        recipe = load_recipe(None, [*halves, f"steps={steps}"])
        warmup, decay, _, _ = in_steps(recipe)
        assert (warmup, decay) == (steps // 2, max(1, steps // 2))


def test_a_share_stays_a_share_in_the_recipe_of_the_run(tmp_path):
    recipe = load_recipe(None, ["batch.rows=1", "schedule.warmup_steps=12.5%", "validation.every=7"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "recipe.yaml", ["steps=80"])
    assert again.schedule.warmup_steps == "12.5%" and in_steps(again) == (10, 0, 7, 500)


@pytest.mark.parametrize("value", ["0.1", "110%", "0%", "ten", "10 %", "-5%", "-1", "1e1%", "10%%", "null"])
@pytest.mark.parametrize(("key", "least"), [("schedule.warmup_steps", 0), ("checkpoint.every", 1)])
def test_other_values_are_refused(key, least, value):
    with pytest.raises(UserError) as error:
        load_recipe(None, ["batch.rows=1", f"{key}={value}"])
    assert str(error.value) == (
        f"{key}={value} on the command line must be an integer of at least {least} or a share of the steps such as 10%"
    )
