"""Adapts a DeepSpeed engine to what the checkpoint manager needs, until `training.engine.Engine` does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class DeepSpeedCheckpoints:
    """Saves and loads the checkpoints of a DeepSpeed engine; see `checkpoint.manager.CheckpointEngine`."""

    def __init__(self, engine: Any):
        self._engine = engine

    @property
    def module(self) -> Any:
        return self._engine.module

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state=client_state, save_latest=False)

    def load(self, folder: Path) -> dict[str, Any]:
        _, client_state = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        # DeepSpeed restores the learning rates too: those of the earlier schedule, if the recipe's has changed.
        schedule, groups = self._engine.lr_scheduler, self._engine.optimizer.param_groups
        for group, peak, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = peak * factor(schedule.last_epoch)
        return client_state

    def load_universal(self, folder: Path) -> dict[str, Any]:
        with _padding_only_groups(self._engine.optimizer):
            self._engine._config.load_universal_checkpoint = True  # `checkpoint.load_universal`, for this call alone
            try:
                return self.load(folder)
            finally:
                self._engine._config.load_universal_checkpoint = False


@contextmanager
def _padding_only_groups(optimizer: Any) -> Iterator[None]:
    """Give each parameter group of which this rank holds padding alone a stand-in while the block runs.

    DeepSpeed 0.19.8 reads a group's step from the first parameter that this rank holds, and fails with an IndexError if
    none is held: gates are few numbers, so with many ranks some hold none.
    """
    empty = [group for group in optimizer.bit16_groups if all(lp._hp_mapping is None for lp in group)]
    for group in empty:
        stand_in: Any = torch.empty(0)
        stand_in._hp_mapping = SimpleNamespace(get_optim_state_keys=list)
        stand_in.load_hp_checkpoint_state = lambda *_, **__: None
        optimizer.param_names[stand_in] = ""
        group.append(stand_in)
    try:
        yield
    finally:
        for group in empty:
            del optimizer.param_names[group.pop()]
