"""Whether the memory is in good health: its gates, the norms of M and z, and what it gains. A sentence for each ill."""

from torch import Tensor

from infini_ds.config.lr_schedule import gate_reach
from infini_ds.config.recipe import Recipe
from infini_ds.metrics.metric_writers import read_metrics

ALIKE = 0.01  # between the smallest gate and the largest
REACH = 1.0  # that a gate beta could have moved before gates that are alike say anything
PINNED = 0.01  # this close to 0 or 1 the gradient of a gate is a 25th of that at 1/2, or less
GROWN = 10.0  # times what a norm was once the first tenth of the steps was made


def gate_metrics(gates: Tensor) -> dict[str, float]:
    """Of the (layers, H) gates: the spread of all, and the share that is pinned near 0 or 1."""
    pinned = (gates < PINNED) | (gates > 1 - PINNED)
    return {
        "memory/gate_spread": (gates.max() - gates.min()).item(),
        "memory/gates_pinned": pinned.float().mean().item(),
    }


class MemoryDiagnostics:
    """Looks at the figures that a run records, and says each thing once."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._said: set[str] = set()
        self._reference: dict[str, float] = {}
        for line in read_metrics(recipe.folder):
            self._learn(line["step"], line)

    def hints(self, step: int, figures: dict[str, float]) -> list[str]:
        """Sentences on the figures of one step, of training or of validation; each kind once."""
        self._learn(step, figures)
        return [sentence for kind, sentence in self._ills(step, figures) if self._is_new(kind)]

    def _learn(self, step: int, figures: dict[str, float]) -> None:
        if step >= max(self.recipe.steps // 10, self.recipe.schedule.warmup_steps):
            for name, value in figures.items():
                if "_norm/" in name:
                    self._reference.setdefault(name, value)

    def _ills(self, step: int, figures: dict[str, float]):
        rate = self.recipe.optimizer.gate_learning_rate
        spread, pinned = figures.get("memory/gate_spread"), figures.get("memory/gates_pinned")
        if pinned is not None and pinned >= 0.5:
            yield (
                "pinned",
                f"{pinned:.0%} of the gates are within {PINNED} of 0 or 1, where they hardly learn: lower "
                f"optimizer.gate_learning_rate={rate}",
            )
        elif spread is not None and spread < ALIKE and gate_reach(self.recipe, step) > REACH:
            yield (
                "alike",
                f"all gates are alike, within {spread:.4f}: no head has chosen between memory and local attention; "
                f"raise optimizer.gate_learning_rate={rate}, or give rows of more segments",
            )
        for name, value in figures.items():
            before = self._reference.get(name, 0)
            if before and value > GROWN * before:
                _, norm, layer = name.split("/")
                yield (
                    norm,
                    f"the norm of {norm[0]} in {layer} has grown from {before:.3g} to {value:.3g}: if it goes on, "
                    f"lower optimizer.learning_rate={self.recipe.optimizer.learning_rate}, or take "
                    "model.memory_rule=delta",
                )
        gained = figures.get("validation/gained_by_memory")
        if gained is not None and gained < 0 and step >= max(self.recipe.steps // 10, 1):
            yield (
                "gained",
                f"the memory costs {-gained:.4f} of loss on the validation rows, rather than gaining any: if it stays "
                f"so, raise optimizer.gate_learning_rate={rate} to let heads leave it, or train on longer documents",
            )

    def _is_new(self, kind: str) -> bool:
        new = kind not in self._said
        self._said.add(kind)
        return new
