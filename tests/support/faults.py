"""Faults for the stability checks to find: `inject` one into a trainer, or start a rank of launch/pretrain.py with it.

python tests/support/faults.py FAULT.pt key=value ...
"""

import os
import runpy
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from infini_ds.training.trainer import Trainer


@dataclass(frozen=True)
class Fault:
    """A fault of a model.

    Attributes:
        kind: "embedding" makes the embeddings of its rows NaN; "loss" makes the loss NaN, but not its gradient; "spike"
            triples the loss; "gradient" scales one parameter's gradient.
        rows: (R, T) ids of the rows that it hits.
        rank: the only rank that it hits; None for all.
        dies: the process exits in a rollback, once the rows to skip are written.
    """

    kind: str
    rows: Tensor | None = None
    rank: int | None = None
    dies: bool = False


def inject(trainer: Trainer, fault: Fault) -> None:
    if fault.rank not in (None, trainer.run.dims.rank):
        return
    model = trainer.model

    def is_hit(ids: Tensor) -> Tensor:
        """(B,) which rows the fault hits, by as many of their tokens as this block of segments has."""
        T = ids.shape[1]
        return (ids[:, None] == fault.rows[None, :, :T]).all(-1).any(-1)

    def embedding(_, arguments, output):
        return output.masked_fill(is_hit(arguments[0].flatten(1))[(...,) + (None,) * (output.dim() - 1)], torch.nan)

    def loss(_, arguments, keywords, output):
        if is_hit(keywords["input_ids"]).any():
            output.loss = output.loss * 3 if fault.kind == "spike" else output.loss + torch.nan
        return output

    if fault.kind == "embedding":
        model.transformer.wte.register_forward_hook(embedding)
    elif fault.kind == "gradient":
        model.transformer.h[1].ln_1.weight.register_hook(lambda gradient: 1.1 * gradient)
    else:
        model.register_forward_hook(loss, with_kwargs=True)
    if fault.dies:
        trainer.restore = lambda *_: os._exit(9)


if __name__ == "__main__":
    from infini_ds.training import setup

    fault, build_trainer = torch.load(sys.argv.pop(1), weights_only=False), setup.build_trainer

    def build_faulty_trainer(*arguments):
        trainer = build_trainer(*arguments)
        inject(trainer, fault)
        return trainer

    setup.build_trainer = build_faulty_trainer
    runpy.run_path("launch/pretrain.py", run_name="__main__")
