"""Metric files of a run: TensorBoard events to look at, `metrics.jsonl` for reports and other programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.model.memory_rule import State, state_tensors
from infini_ds.utils.atomic import write_text_atomic

FILE = "metrics.jsonl"


class MetricWriter:
    """Writes `name -> value` at a step. Opening it removes what was recorded of steps after `first_step`.

    Args:
        run: the run's folder, created if it does not exist.
        first_step: the step that the run stands at; at 0 everything recorded before is removed.
    """

    def __init__(self, run: Path, first_step: int):
        run.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(line) for line in read_metrics(run) if first_step and line["step"] <= first_step]
        write_text_atomic(run / FILE, "".join(line + "\n" for line in kept))
        self._file = (run / FILE).open("a", buffering=1)
        self._board = SummaryWriter(str(run), purge_step=first_step + 1 if first_step else 0)

    def record(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        self._board.add_histogram(name, values, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run: Path) -> list[dict]:
    """Return the lines recorded so far, without an incomplete last line, which a run that was killed leaves."""
    lines = []
    if (run / FILE).exists():
        for line in (run / FILE).read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return lines


def gates(model: InfiniGPTNeoForCausalLM) -> Tensor:
    """Return (layers, H) sigmoid(beta), the weight of the memory in each head's output, on the CPU."""
    layers: Any = model.transformer.h
    return torch.stack([torch.sigmoid(layer.attention.beta.detach().float()) for layer in layers]).cpu()


def memory_metrics(model: InfiniGPTNeoForCausalLM, memory: Sequence[State]) -> dict[str, float]:
    """Return each head's gate, and the norm of each tensor of each layer's state, averaged over rows and heads.

    Args:
        memory: each layer's state at the end of a row; its tensors are (B, H, ...).
    """
    values: dict[str, float] = {}
    for layer, gates_of_heads in enumerate(gates(model).tolist()):
        values |= {f"gate/layer_{layer}/head_{head}": gate for head, gate in enumerate(gates_of_heads)}
    for layer, state in enumerate(memory):
        for name, tensor in state_tensors(state).items():
            norms = tensor.detach().norm(dim=tuple(range(min(2, tensor.dim() - 1), tensor.dim())))
            values[f"memory/{name}_norm/layer_{layer}"] = norms.mean().item()
    return values
