"""Faults for the guards to find: `inject` them into a run, or `python tests/support/faults.py FAULT.pt key=value ...` as one of
the ranks of launch/pretrain.py.
"""

import os
import runpy
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fault:
    kind: str  # embedding: not a number, in its rows; loss: not a number; spike: three times the loss; gradient: scaled
    rows: torch.Tensor | None = None  # (R, T) the ids of the rows that it befalls
    rank: int | None = None  # the only rank that it befalls
    dies: bool = False  # the process, in going back


def inject(training, fault: Fault) -> None:
    if fault.rank not in (None, training.process.rank):
        return
    model = training.model

    def hit(ids: torch.Tensor) -> torch.Tensor:
        """(B,) which of the rows are the fault's: by the tokens that this block of segments shows of them."""
        T = ids.shape[1]
        return (ids[:, None] == fault.rows[None, :, :T]).all(-1).any(-1)

    def embedding(_, arguments, output):
        return output.masked_fill(hit(arguments[0].flatten(1))[(...,) + (None,) * (output.dim() - 1)], torch.nan)

    def loss(_, arguments, keywords, output):
        if hit(keywords["input_ids"]).any():
            output.loss = output.loss * 3 if fault.kind == "spike" else output.loss + torch.nan
        return output

    if fault.kind == "embedding":
        model.transformer.wte.register_forward_hook(embedding)
    elif fault.kind == "gradient":
        model.transformer.h[1].ln_1.weight.register_hook(lambda gradient: 1.1 * gradient)
    else:
        model.register_forward_hook(loss, with_kwargs=True)
    if fault.dies:
        type(training.stream).at = lambda *_: os._exit(9)


if __name__ == "__main__":
    from infini_ds.training import setup

    injected, whole = torch.load(sys.argv.pop(1), weights_only=False), setup.set_up

    def set_up(recipe, process):
        training = whole(recipe, process)
        inject(training, injected)
        return training

    setup.set_up = set_up
    runpy.run_path("launch/pretrain.py", run_name="__main__")
