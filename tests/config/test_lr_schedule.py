"""Learning-rate schedules."""

from itertools import pairwise

import pytest

from infini_ds.config.lr_schedule import factor, gate_factor, gate_reach
from infini_ds.config.recipe import OptimizerSection, Recipe, ScheduleSection


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_schedule(kind):
    schedule = ScheduleSection(kind=kind, warmup_steps=10, decay_steps=20 if kind == "wsd" else 0, final_ratio=0.1)
    factors = [factor(schedule, 100, step) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert all(a >= b for a, b in pairwise(factors[9:]))
    assert factors[100] == pytest.approx(1.0 if kind == "constant" else 0.1)
    if kind == "wsd":
        assert factors[80] == 1.0 and factors[90] == pytest.approx(0.55)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_gates_have_no_warmup_and_need_not_decay(kind):
    schedule = ScheduleSection(kind=kind, warmup_steps=10, decay_steps=20)
    assert gate_factor(schedule, 100, 0) == 1.0
    assert gate_factor(schedule, 100, 99) == factor(schedule, 100, 99)
    assert gate_factor(schedule.model_copy(update={"gates": "constant"}), 100, 99) == 1.0


def test_gate_reach_is_the_sum_of_the_gates_learning_rates():
    schedule = ScheduleSection(kind="constant", warmup_steps=50)
    recipe = Recipe(steps=100, schedule=schedule, optimizer=OptimizerSection(gate_learning_rate=0.02))
    assert gate_reach(recipe) == pytest.approx(2.0)
    assert gate_reach(recipe, steps=10) == pytest.approx(0.2)
