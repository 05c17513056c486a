"""Count the collective operations of each step of a run, as one of the ranks of launch/pretrain.py.

python tests/support/count_collectives.py OUT key=value ...      writes OUT/collectives-RANK.json
"""

import functools
import json
import os
import runpy
import sys
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from infini_ds.training.hooks import Hook

COLLECTIVES = [
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single"),
    *("barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "reduce"),
    *("reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "recv", "isend", "irecv"),
    "reduce_scatter_single",
]


class Counter(Hook):
    """Records the names of the collectives that are called from the start of one step to the start of the next, and the
    bytes of this rank's own that ours take: what it gives to a gather, and what it gets of a scatter.
    """

    def __init__(self) -> None:
        self.ours: list[list[str]] = []
        self.bytes: list[int] = []
        self.deepspeed: list[list[str]] = []
        self._active = False
        for name in COLLECTIVES:
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name, collective):
        @functools.wraps(collective)
        def call(*arguments, **keywords):
            if self._active:
                of_deepspeed = _called_by_deepspeed()
                (self.deepspeed if of_deepspeed else self.ours)[-1].append(name)
                if not of_deepspeed:
                    self.bytes[-1] += min(x.nbytes for x in arguments if isinstance(x, Tensor))
            return collective(*arguments, **keywords)

        return call

    def on_step_start(self, trainer, step) -> None:
        self._active = True
        self.ours.append([])
        self.bytes.append(0)
        self.deepspeed.append([])

    def on_step_end(self, trainer, step) -> None:
        self._active = step.number < trainer.recipe.steps  # the checkpoint of the last step comes after this hook


def _called_by_deepspeed() -> bool:
    """Return whether the call is DeepSpeed's own: the model calls collectives too, inside of DeepSpeed's backward."""
    frame = sys._getframe(2)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package in ("deepspeed", "infini_ds"):
            return package == "deepspeed"
        frame = frame.f_back
    return False


if __name__ == "__main__":
    out = Path(sys.argv.pop(1))
    counter = Counter()
    from infini_ds.training import setup

    build_trainer = setup.build_trainer

    def build_counting_trainer(*arguments):
        trainer = build_trainer(*arguments)
        trainer.hooks = [counter, *trainer.hooks]
        return trainer

    setup.build_trainer = build_counting_trainer
    runpy.run_path("launch/pretrain.py", run_name="__main__")
    counted = {"ours": counter.ours, "deepspeed": counter.deepspeed, "bytes": counter.bytes}
    (out / f"collectives-{os.environ['RANK']}.json").write_text(json.dumps(counted))
