"""The short report of a run: what it reached with the memory and without, a sample of its text, where things lie."""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from infini_ds.checkpoint.manifest import read_manifest
from infini_ds.conversion.locate import load_model, load_tokenizer, locate
from infini_ds.data.streams import ValidationRows
from infini_ds.evaluation import plots
from infini_ds.evaluation.generation import prompt_ids
from infini_ds.evaluation.position import binned, sources_of
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.training.validation import PositionLosses, position_losses
from infini_ds.utils.errors import UserError
from infini_ds.utils.progress import ProgressBar

BINS = 64  # points in the plot of loss by position, unless the sequence has fewer segments
PROMPT_TOKENS, SAMPLE_TOKENS = 48, 120


@dataclass(frozen=True)
class Report:
    """What was measured on a run's newest checkpoint, exported to `model`. Losses: nats a token; speed: of training."""

    run: Path
    model: Path
    parameters: int
    segment_length: int
    step: int
    tokens: int
    rows: int
    on: PositionLosses
    off: PositionLosses
    tokens_per_second: float
    mfu: float
    prompt: str
    sample: str
    metrics: list[dict]
    data: list[dict]


def measure(run: Path, model_folder: Path, rows: int | None) -> Report:
    """Evaluate the run's newest checkpoint on `rows` of its validation rows (None: all); `model_folder` is its export.

    Raises:
        UserError: a folder is missing or unfinished.
    """
    sources = sources_of(run)
    metrics = read_metrics(run)
    trained = [line for line in metrics if "speed/tokens_per_s" in line]
    if not trained:
        raise UserError(f"{run} has recorded no training step yet")
    source = locate(run)
    stands = read_manifest(source.checkpoint).state
    model, tokenizer = load_model(source), load_tokenizer(source)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    validation = ValidationRows(sources)
    rows = min(rows or len(validation), len(validation))
    with ProgressBar("evaluating", 2 * rows) as progress:
        on, off = (
            position_losses(
                model, validation, rows, 1, use_memory, lambda: progress.advance({"rows": str(progress.done)})
            )
            for use_memory in (True, False)
        )
    middle = sorted(trained, key=lambda line: line["speed/tokens_per_s"])[len(trained) // 2]
    prompt, sample = sample_text(model, tokenizer, validation)
    return Report(
        run=run,
        model=model_folder,
        parameters=sum(p.numel() for p in model.parameters()),
        segment_length=model.config.segment_length,
        step=stands.step,
        tokens=stands.tokens,
        rows=rows,
        on=on,
        off=off,
        tokens_per_second=middle["speed/tokens_per_s"],
        mfu=middle["speed/mfu"],
        prompt=prompt,
        sample=sample,
        metrics=metrics,
        data=[stream["manifest"] for stream in json.loads((run / "data_manifest.json").read_text())["streams"]],
    )


def sample_text(model, tokenizer, validation: ValidationRows) -> tuple[str, str]:
    """The start of the first validation document, and how the model goes on (seeded)."""
    ids = validation[0]["input_ids"][1 : PROMPT_TOKENS + 1].tolist()
    prompt = tokenizer.decode(ids)
    torch.manual_seed(0)
    inputs = prompt_ids(tokenizer, model, prompt)
    output = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=True, temperature=0.8, top_p=0.95)
    return prompt, tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def write(report: Report) -> Path:
    """Write `report.md` and its pictures into the run's folder; returns the file."""
    run = report.run
    plots.loss_curves(report.metrics, run / "loss.png")
    segments = -(-(len(report.on.loss) + 1) // report.segment_length)
    width = report.segment_length * -(-segments // BINS)
    middles, on = binned(report.on, width)
    _, off = binned(report.off, width)
    plots.loss_by_position(middles, on, off, report.segment_length, run / "loss_by_position.png")
    plots.gates(report.metrics, run / "gates.png")
    rows = [
        f"| {middle:,.0f} | {a:.4f} | {b:.4f} | {b - a:+.4f} |" for middle, a, b in zip(middles, on, off, strict=True)
    ]
    shown = rows if len(rows) <= 16 else rows[:: -(-len(rows) // 16)]
    text = f"""# {run.name}

{chr(10).join(f"- {name}: {value}" for name, value in facts(report))}

![Loss over the steps](loss.png)

![Loss by position](loss_by_position.png)

| position | loss | memory off | gained |
|---:|---:|---:|---:|
{chr(10).join(shown)}

![Gates](gates.png)

## A sample
The prompt is the beginning of the first validation document.

> {quote(report.prompt)}**{quote(report.sample)}**

## What next
```sh
{chr(10).join(next_commands(report))}
```
"""
    (run / "report.md").write_text(text)
    return run / "report.md"


def quote(text: str) -> str:
    escaped = (
        text.replace("\\", "\\\\").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;").replace("`", "\\`")
    )
    return escaped.replace("\n", "  \n> ")


def facts(report: Report) -> list[tuple[str, str]]:
    """What the report says in words, as (name, value)."""
    on, off = report.on.mean, report.off.mean
    return [
        ("model", f"{report.parameters / 1e6:.1f}M parameters, segments of {report.segment_length} tokens"),
        (
            "data",
            "; ".join(f"{one['options']['source']}: {one['train']['tokens']:,} training tokens" for one in report.data)
            + f"; in rows of {report.data[0]['sequence_length']:,}",
        ),
        ("trained", f"{report.step:,} steps, {report.tokens:,} tokens"),
        ("validation loss", f"{on:.4f} (perplexity {math.exp(on):.2f})"),
        ("with the memory off", f"{off:.4f} (perplexity {math.exp(off):.2f})"),
        ("measured on", f"{int(report.on.count.sum()):,} tokens of {report.rows} validation rows"),
        ("speed", f"{report.tokens_per_second:,.0f} tokens/s in training, MFU {report.mfu:.0%}"),
        ("model folder", str(report.model)),
        ("run folder", str(report.run)),
    ]


def next_commands(report: Report) -> list[str]:
    model, run, runs = (shlex.quote(str(path)) for path in (report.model, report.run, report.run.parent))
    prompt = shlex.quote(" ".join(report.prompt.split()[:4]))
    return [
        f"python launch/generate.py {model} --prompt {prompt}",
        f"tensorboard --logdir {runs}",
        f"deepspeed launch/pretrain.py --config {run}/recipe.yaml steps={2 * report.step}",
    ]


def show(report: Report, file: Path) -> None:
    """Print the report's facts and its sample."""
    width = max(len(name) for name, _ in facts(report))
    print("\n" + "\n".join(f"{name:>{width}}  {value}" for name, value in [*facts(report), ("report", str(file))]))
    print(f"\n--- a sample: the model goes on from {PROMPT_TOKENS} tokens of a validation document")
    print(f"{report.prompt}⟦{report.sample}⟧")
    print("\n--- try next\n" + "\n".join(next_commands(report)), flush=True)
