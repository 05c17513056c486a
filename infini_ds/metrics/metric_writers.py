"""What a run records: TensorBoard events for the eye, `metrics.jsonl` for the report and other programs."""

import json
import os
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.model.memory_rule import State, state_tensors

FILE = "metrics.jsonl"


class MetricWriter:
    """Writes `name -> value` at a step. After a resume, what was recorded beyond the checkpoint is written over."""

    def __init__(self, run: Path, first_step: int):
        run.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(line) for line in read_metrics(run) if first_step and line["step"] <= first_step]
        partial = run / (FILE + ".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, run / FILE)
        self._file = (run / FILE).open("a", buffering=1)
        self._board = SummaryWriter(str(run), purge_step=first_step + 1 if first_step else 0)

    def record(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def histogram(self, step: int, name: str, values: torch.Tensor) -> None:
        self._board.add_histogram(name, values, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run: Path) -> list[dict]:
    """The lines recorded so far; the last one of a run that was killed may be broken off and is left out."""
    lines = []
    if (run / FILE).exists():
        for line in (run / FILE).read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return lines


def gates(model: InfiniGPTNeoForCausalLM) -> torch.Tensor:
    """(layers, H) sigmoid(beta), the share of the memory in each head's output."""
    return torch.stack([torch.sigmoid(layer.attention.beta.detach().float()) for layer in model.transformer.h]).cpu()


def memory_metrics(model: InfiniGPTNeoForCausalLM, memory: tuple[State, ...]) -> dict[str, float]:
    """Each head's gate, and each layer's norms of its state (M, z) at the end of a row, averaged over rows and heads."""
    values = {}
    for layer, of_heads in enumerate(gates(model).tolist()):
        values |= {f"gate/layer_{layer}/head_{head}": gate for head, gate in enumerate(of_heads)}
    for layer, state in enumerate(memory):
        for name, x in state_tensors(state).items():
            norm = x.detach().norm(dim=tuple(range(min(2, x.dim() - 1), x.dim())))
            values[f"memory/{name}_norm/layer_{layer}"] = norm.mean().item()
    return values
