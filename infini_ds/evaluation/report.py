"""The report of a run: its losses with the memory on and off, a sample of its text, plots, and where its files are."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from infini_ds.checkpoint.manifest import read_manifest
from infini_ds.conversion.locate import load_model, load_tokenizer, locate
from infini_ds.data.streams import ValidationRows
from infini_ds.evaluation.generation import prompt_inputs
from infini_ds.evaluation.plots import plot_gates, plot_loss_by_position, plot_loss_curves
from infini_ds.evaluation.tasks.position import bin_means
from infini_ds.evaluation.validation_rows import sources_of_run
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.training.validation import PositionLosses, position_losses
from infini_ds.utils.counts import short_count
from infini_ds.utils.errors import UserError
from infini_ds.utils.progress import ProgressBar

MAX_BINS = 64  # of the plot of loss by position
MAX_LINES = 16  # of the table of loss by position
PROMPT_TOKENS, SAMPLE_TOKENS = 48, 120


@dataclass(frozen=True)
class RunReport:
    """What was measured on a run's newest checkpoint, which is exported to `model`.

    step, tokens: of training. ranks: that wrote the checkpoint. rows: validation rows that were evaluated. on, off:
    losses with the memory on and off, in nats a token. tokens_per_second, mfu: of training, medians. metrics: all that
    the run recorded. data: the manifest of each of its streams, or of each stage of its curriculum. stage, stages: the
    stage that the checkpoint is in, from 1, and their number; 1 of 1 without a curriculum.
    """

    run: Path
    model: Path
    parameters: int
    segment_length: int
    step: int
    tokens: int
    ranks: int
    rows: int
    on: PositionLosses
    off: PositionLosses
    tokens_per_second: float
    mfu: float
    prompt: str
    sample: str
    metrics: list[dict[str, float]]
    data: list[dict[str, Any]]
    stage: int = 1
    stages: int = 1


def evaluate_run(run: Path, model_folder: Path, rows: int | None) -> RunReport:
    """Evaluate the run's newest checkpoint on its first `rows` validation rows (None: all).

    Args:
        model_folder: its export, which the report names.
    Raises:
        UserError: the folder is not a run, or the run has no complete checkpoint.
    """
    sources = sources_of_run(run)
    metrics = read_metrics(run)
    with_speed = [line for line in metrics if "speed/tokens_per_s" in line]
    if not with_speed:
        raise UserError(f"{run} has not recorded a training step yet")
    location = locate(run)
    assert location.checkpoint is not None  # it is a run
    manifest = read_manifest(location.checkpoint)
    described = json.loads((run / "data_manifest.json").read_text())
    tokenizer = load_tokenizer(location)
    model = load_model(location, device="cuda" if torch.cuda.is_available() else "cpu")
    validation = ValidationRows(sources)
    rows = min(rows or len(validation), len(validation))
    with ProgressBar("evaluating", 2 * rows) as progress:
        on, off = (
            position_losses(
                model, validation, rows, 1, use_memory, lambda: progress.advance({"rows": str(progress.done)})
            )
            for use_memory in (True, False)
        )
    assert on is not None and off is not None  # nothing asked for a stop
    median = sorted(with_speed, key=lambda line: line["speed/tokens_per_s"])[len(with_speed) // 2]
    prompt, sample = generate_sample(model, tokenizer, validation)
    return RunReport(
        run=run,
        model=model_folder,
        parameters=sum(p.numel() for p in model.parameters()),
        segment_length=model.config.segment_length,
        step=manifest.state.step,
        tokens=manifest.state.tokens,
        ranks=manifest.world_size,
        rows=rows,
        on=on,
        off=off,
        tokens_per_second=median["speed/tokens_per_s"],
        mfu=median["speed/mfu"],
        prompt=prompt,
        sample=sample,
        metrics=metrics,
        data=[stream["manifest"] for stream in described["streams"]],
        stage=manifest.state.stage + 1,
        stages=len((described.get("fingerprint") or {}).get("stages", [0])),
    )


def generate_sample(
    model: InfiniGPTNeoForCausalLM, tokenizer: PreTrainedTokenizerBase, validation: ValidationRows
) -> tuple[str, str]:
    """Return the start of the first validation document, and the model's continuation with a fixed seed."""
    ids = validation[0]["input_ids"][1 : PROMPT_TOKENS + 1].tolist()
    prompt = tokenizer.decode(ids)
    torch.manual_seed(0)
    inputs = prompt_inputs(tokenizer, model, prompt)
    output = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=True, temperature=0.8, top_p=0.95)
    return prompt, tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def write_report(report: RunReport, next_commands: Sequence[str]) -> Path:
    """Write `report.md` and its plots to the run's folder, and return the file.

    Args:
        next_commands: what the reader can run next.
    """
    run = report.run
    plot_loss_curves(report.metrics, run / "loss.png")
    segments = -(-(len(report.on.loss) + 1) // report.segment_length)
    width = report.segment_length * -(-segments // MAX_BINS)
    middles, on = bin_means(report.on, width)
    _, off = bin_means(report.off, width)
    plot_loss_by_position(middles, on, off, report.segment_length, run / "loss_by_position.png")
    plot_gates(report.metrics, run / "gates.png")
    lines = [
        f"| {middle:,.0f} | {a:.4f} | {b:.4f} | {b - a:+.4f} |" for middle, a, b in zip(middles, on, off, strict=True)
    ]
    shown = lines[:: -(-len(lines) // MAX_LINES)]
    text = f"""# {run.name}

{chr(10).join(f"- {name}: {value}" for name, value in report_facts(report))}

![Loss over the steps](loss.png)

![Loss by position](loss_by_position.png)

| position | loss | memory off | gain |
|---:|---:|---:|---:|
{chr(10).join(shown)}

![Gates](gates.png)

## A sample
The prompt is the beginning of the first validation document.

> {quote(report.prompt)}**{quote(report.sample)}**

## What next
```sh
{chr(10).join(next_commands)}
```
"""
    (run / "report.md").write_text(text)
    return run / "report.md"


def quote(text: str) -> str:
    """Return text that Markdown shows as it is, inside a quotation."""
    escaped = (
        text.replace("\\", "\\\\").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;").replace("`", "\\`")
    )
    return escaped.replace("\n", "  \n> ")


def report_facts(report: RunReport) -> list[tuple[str, str]]:
    """Return the lines of the report, as (name, value)."""
    on, off = report.on.mean, report.off.mean
    trained_on = "; ".join(
        f"{manifest['options']['source']}: {manifest['train']['tokens']:,} training tokens" for manifest in report.data
    )
    lengths = dict.fromkeys(f"{manifest['sequence_length']:,}" for manifest in report.data)
    stage = f", in stage {report.stage} of {report.stages}" if report.stages > 1 else ""
    return [
        ("model", f"{short_count(report.parameters)} parameters, segments of {report.segment_length} tokens"),
        ("data", f"{trained_on}; in rows of {', '.join(lengths)}"),
        ("trained", f"{report.step:,} steps, {report.tokens:,} tokens{stage}"),
        ("validation loss", f"{on:.4f} (perplexity {math.exp(on):.2f})"),
        ("with the memory off", f"{off:.4f} (perplexity {math.exp(off):.2f})"),
        *recall_facts(report.metrics),
        ("measured on", f"{int(report.on.count.sum()):,} tokens of {report.rows} validation rows"),
        ("speed", f"{report.tokens_per_second:,.0f} tokens/s in training, MFU {report.mfu:.0%}"),
        ("model folder", str(report.model)),
        ("run folder", str(report.run)),
    ]


def recall_facts(metrics: list[dict[str, float]]) -> list[tuple[str, str]]:
    """Return a line for each recall task that the run measured at its last validation."""
    prefix, off = "validation/recall/", "validation/recall_memory_off/"
    last = next((line for line in reversed(metrics) if any(name.startswith(prefix) for name in line)), {})
    return [
        ("recall", f"{value:.3f}, with the memory off {last[off + task]:.3f} ({task})")
        for name, value in last.items()
        if (task := name.removeprefix(prefix)) != name
    ]


def print_report(report: RunReport, file: Path, next_commands: Sequence[str]) -> None:
    """Print the report's lines, its sample, and what to run next."""
    lines = [*report_facts(report), ("report", str(file))]
    width = max(len(name) for name, _ in lines)
    print("\n" + "\n".join(f"{name:>{width}}  {value}" for name, value in lines))
    print(f"\n--- a sample: the model continues the first {PROMPT_TOKENS} tokens of a validation document")
    print(f"{report.prompt}⟦{report.sample}⟧")
    print("\n--- try next\n" + "\n".join(next_commands), flush=True)
