"""The result of a check: figures that a limit bounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """A figure and the bounds that it has to keep; None: no bound on that side."""

    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def passed(self) -> bool:
        """Written this way so that NaN is rejected too."""
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )


@dataclass(frozen=True)
class CheckResult:
    """What a check compared.

    Attributes:
        figures: of interest beside the comparisons, by name.
        unavailable: a sentence for each part that cannot run on this device, or with these packages.
    """

    comparisons: tuple[Comparison, ...]
    figures: dict[str, float]
    unavailable: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "CheckResult":
        """Return the result that a worker printed."""
        comparisons = tuple(Comparison(**one) for one in content["comparisons"])
        return cls(comparisons, content["figures"], tuple(content["unavailable"]))

    @property
    def failed(self) -> list[Comparison]:
        return [one for one in self.comparisons if not one.passed]


def relative_difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return |found - wanted| / |wanted| in fp64, over all tensors together; not finite where `wanted` is 0."""
    a, b = (torch.cat([x.detach().double().flatten() for x in tensors]) for tensors in (found, wanted))
    return float((a - b).norm() / b.norm())
