"""Learning-rate schedules, as factors of the peak learning rate."""

import math

from infini_ds.config.recipe import Recipe, ScheduleSection


def factor(schedule: ScheduleSection, steps: int, step: int) -> float:
    """Return the factor at 0-based `step` of `steps`: linear warm-up, then the schedule's kind to `final_ratio`."""
    warmup = schedule.warmup(steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    decay_steps = schedule.decay(steps) if schedule.kind == "wsd" else steps - warmup
    progress = max(0.0, (step - (steps - decay_steps)) / max(1, decay_steps))
    remaining = 1 - min(1.0, progress)
    if schedule.kind == "cosine":
        remaining = (1 - math.cos(math.pi * remaining)) / 2
    return schedule.final_ratio + (1 - schedule.final_ratio) * remaining


def gate_factor(schedule: ScheduleSection, steps: int, step: int) -> float:
    """Return the factor of the gates, which have no warm-up, and no decay with `gates: constant`."""
    if schedule.gates == "constant":
        return 1.0
    return factor(schedule, steps, max(step, schedule.warmup(steps)))


def gate_reach(recipe: Recipe, steps: int | None = None) -> float:
    """Return how far a gate beta can move from its start in the first `steps` steps (None: in all steps).

    Adam moves a value by at most its learning rate a step where 1 - beta1 <= sqrt(1 - beta2), as usual (Kingma and Ba
    2015, section 2.1).
    """
    factors = (gate_factor(recipe.schedule, recipe.steps, step) for step in range(recipe.steps)[:steps])
    return recipe.optimizer.gate_learning_rate * sum(factors)
