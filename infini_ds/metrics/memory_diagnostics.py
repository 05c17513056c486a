"""Diagnostics of the memory: gates, norms of the state, gain in loss. One warning for each problem found."""

from collections import deque
from collections.abc import Iterator

from torch import Tensor

from infini_ds.config.lr_schedule import gate_reach
from infini_ds.config.recipe import Recipe
from infini_ds.metrics.metric_writers import read_metrics

MIN_SPREAD = 0.01  # between the smallest gate and the largest, below which all gates are alike
MIN_REACH = 1.0  # that a gate's beta could have moved before a small spread is a problem
SATURATION = 0.01  # this close to 0 or 1 the gradient of a gate is a 25th of that at 1/2, or less
# Of a norm, relative to its value at half as many steps. Adam moves a weight by at most its learning rate a step, so
# while steps double, the weights of keys and values at most about double, and their products in M grow fourfold. The
# lengths of the documents that end rows add to that: the default run's largest growth is 5.3.
MAX_GROWTH = 10.0
MIN_COST = 1e-3  # nats a token by which the memory raises the validation loss; less is no reason to change anything


def hint_on_slow_gates(recipe: Recipe) -> str | None:
    """Return a sentence if the recipe trains its gates, but too slowly to leave their start; otherwise None."""
    reach = gate_reach(recipe)
    if not 0 < reach < MIN_REACH:
        return None
    return (
        f"each gate can move by {reach:.2f} at most in all {recipe.steps} steps, so it stays near its start: more "
        "steps or a larger optimizer.gate_learning_rate let it move"
    )


def gate_metrics(gates: Tensor) -> dict[str, float]:
    """Return the spread of all (layers, H) gates, and the share of them that is saturated, near 0 or 1."""
    saturated = (gates < SATURATION) | (gates > 1 - SATURATION)
    return {
        "memory/gate_spread": (gates.max() - gates.min()).item(),
        "memory/gates_pinned": saturated.float().mean().item(),
    }


class MemoryDiagnostics:
    """Looks for problems in the metrics that a run records; warns of each kind once."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._warned: set[str] = set()
        # (step, norm) by the metric's name, from the last record at half of the present step on; the first norm is the
        # largest of all up to its step.
        self._norms: dict[str, deque[tuple[int, float]]] = {}
        for line in read_metrics(recipe.folder):
            self._keep_norms(line["step"], line)

    def warnings(self, step: int, metrics: dict[str, float]) -> list[str]:
        """Return a sentence for each new problem in the metrics of one step, of training or of validation."""
        self._keep_norms(step, metrics)
        new: dict[str, str] = {}
        for kind, sentence in self._problems(step, metrics):
            if kind not in self._warned:
                new.setdefault(kind, sentence)
        self._warned |= new.keys()
        return list(new.values())

    def _keep_norms(self, step: int, metrics: dict[str, float]) -> None:
        """Keep the norms after a tenth of the steps, and after the warm-up."""
        if step < max(self.recipe.steps // 10, self.recipe.schedule.warmup(self.recipe.steps)):
            return
        for name, value in metrics.items():
            if "_norm/" in name:
                norms = self._norms.setdefault(name, deque())
                norms.append((step, value))
                while len(norms) > 1 and norms[1][0] <= step / 2:
                    _, earlier = norms.popleft()
                    norms[0] = (norms[0][0], max(norms[0][1], earlier))

    def _norm_at_half(self, name: str, step: int) -> float | None:
        """Return the largest norm that was recorded up to half of `step`; None if no step that early has one.

        The largest, since in packed rows a norm also depends on the length of a row's last document.
        """
        norms = self._norms.get(name)
        return norms[0][1] if norms and norms[0][0] <= step / 2 else None

    def _problems(self, step: int, metrics: dict[str, float]) -> Iterator[tuple[str, str]]:
        rate = self.recipe.optimizer.gate_learning_rate
        spread, saturated = metrics.get("memory/gate_spread"), metrics.get("memory/gates_pinned")
        if saturated is not None and saturated >= 0.5:
            yield (
                "saturated",
                f"{saturated:.0%} of the gates are within {SATURATION} of 0 or 1, where they hardly learn: lower "
                f"optimizer.gate_learning_rate={rate}",
            )
        elif spread is not None and spread < MIN_SPREAD and gate_reach(self.recipe, step) > MIN_REACH:
            yield (
                "alike",
                f"all gates are alike, within {spread:.4f}: no head has chosen between memory and local attention; "
                f"raise optimizer.gate_learning_rate={rate}, or give rows of more segments",
            )
        for name, value in metrics.items():
            before = self._norm_at_half(name, step)
            if before and value > MAX_GROWTH * before:
                _, norm, layer = name.split("/")
                yield (
                    norm,
                    f"the norm of {norm.removesuffix('_norm')} in {layer} has grown from {before:.3g} to {value:.3g} "
                    "since half as many steps: if it grows further, lower "
                    f"{self.recipe.optimizer.rates_of_weights}, or set model.memory_rule=delta",
                )
        gained = metrics.get("validation/gained_by_memory")
        noise = 2 * metrics.get("validation/gain_standard_error", 0.0)
        if gained is not None and -gained > max(MIN_COST, noise) and step >= max(self.recipe.steps // 10, 1):
            yield (
                "gained",
                f"the memory raises the validation loss by {-gained:.4f}: if this persists, raise "
                f"optimizer.gate_learning_rate={rate}, so that heads can turn it down, or train on longer documents",
            )
