"""Speed and memory of training, side by side: python launch/benchmark.py

Each figure is measured in a process of its own, contenders in turn, several rounds; shown are medians over the rounds,
and the ratio to the first contender in the same round. Contenders:
    infini:G     this model, G segments a block, recomputed in the backward pass; infini:auto: as many as memory allows
    infini:all   this model, all segments at once, activations kept
    gpt-neo      transformers' GPT-Neo (eager attention, the one that it has)
    infini-transformer-pytorch   the PyPI package, memories not detached: pip install 'infini_ds[benchmark]'

Others: --generation measures the time for a token behind texts of these lengths; --profile shows in which operators a
training step's time goes.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from infini_ds.benchmarks.contenders import OTHERS, Shape, check_name
from infini_ds.benchmarks.measure import Plan, run, summarize
from infini_ds.distributed.entry_point import run_main
from infini_ds.evaluation.plots import plot_speed_and_memory
from infini_ds.model.presets import preset_config
from infini_ds.utils.errors import UserError

OPERATORS = 20  # of a profile that have a line of their own


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens of a row")
    parser.add_argument("--contenders", nargs="+", default=["infini:all", "infini:1", "infini:auto", *OTHERS])
    parser.add_argument("--segment-length", type=int, default=128)
    parser.add_argument("--rule", default="linear", choices=["linear", "delta"], help="how the memory is written")
    parser.add_argument("--preset", help="take width, layers and heads of a preset, such as 33m")
    for name, number in (("width", 256), ("layers", 4), ("heads", 4), ("vocabulary", 5000)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--steps", type=int, default=3, help="steps of a figure, of which the median counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile this model's layers")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--generation", action="store_true", help="measure generation in place of training")
    kind.add_argument("--profile", action="store_true", help="the share of each operator in a training step's time")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder of the figures and the plot")
    args = parser.parse_args()
    for name in ("lengths", "segment_length", "width", "layers", "heads", "vocabulary", "steps", "rounds"):
        if min(value if isinstance(value := getattr(args, name), list) else [value]) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    for contender in args.contenders:
        check_name(contender)
        if args.generation and not contender.startswith("infini:"):
            raise UserError(f"--contenders {contender}: --generation is measured for infini:G alone")
    return args


def chosen_shape(args: argparse.Namespace) -> Shape:
    width, layers, heads = args.width, args.layers, args.heads
    if args.preset:
        try:
            config = preset_config(args.preset)
        except ValueError as error:
            raise UserError(str(error)) from error
        width, layers, heads = config.hidden_size, config.num_layers, config.num_heads
    if width % heads:
        raise UserError(f"--width {width} is not divisible by --heads {heads}")
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    return Shape(width, layers, heads, args.vocabulary, args.segment_length, args.rule, precision, args.compile)


def main() -> None:
    args = options()
    shape = chosen_shape(args)
    kind = "generation" if args.generation else "profile" if args.profile else "training"
    plan = Plan(kind, tuple(args.contenders), tuple(args.lengths), shape, args.steps, args.rounds)
    console, figures = Console(width=None if sys.stdout.isatty() else 120), []
    args.out.mkdir(parents=True, exist_ok=True)
    with console.status("") as status, (args.out / f"{kind}.jsonl").open("w", buffering=1) as file:
        for figure in run(plan):
            figures.append(figure)
            file.write(json.dumps(figure) + "\n")
            status.update(f"{len(figures)} of {len(plan.cases()) * plan.rounds}: {figure['contender']}")
    console.print(f"{machine()}, {shape.precision}: {shape.layers} layers of width {shape.width}, {shape.heads} heads,")
    console.print(f"vocabulary {shape.vocabulary:,}, segments of {shape.segment_length} tokens, {shape.rule} rule.")
    if args.profile:
        for figure in figures:
            console.print(profile_table(figure))
    elif args.generation:
        console.print(generation_table(summarize(plan, figures, "seconds_per_token")))
    else:
        summary = summarize(plan, figures, "tokens_per_s")
        console.print(training_table(summary))
        plot_speed_and_memory(summary, args.out / "training.png")
    console.print(f"Written to {args.out}")


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else platform.machine()}, {torch.get_num_threads()} threads"


def training_table(cases: dict[tuple[int, str], dict]) -> Table:
    table = Table(caption="ratio: tokens/s over the first row's; MFU: of the matrix rate measured in the same process")
    for name in ("tokens", "contender", "tokens/s", "ratio", "MFU", "matrix rate", "peak memory above the model"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    previous = None
    for (tokens, contender), case in cases.items():
        if previous not in (None, tokens):
            table.add_section()
        previous = tokens
        if "failed" in case:
            table.add_row(f"{tokens:,}", contender, case["failed"])
            continue
        block = case.get("segments_per_block") if contender.endswith("auto") else None
        table.add_row(
            f"{tokens:,}",
            contender + (f" (G = {block:.0f})" if block else ""),
            f"{case['tokens_per_s']:,.0f}",
            f"{case['ratio']:.2f}" if "ratio" in case else "",
            f"{case['mfu']:.0%}" if "mfu" in case else "",
            f"{case['matrix_flops'] / 1e9:,.0f} GFLOP/s",
            f"{case['peak_memory'] / 2**20:,.0f} MiB",
        )
    return table


def profile_table(figure: dict) -> Table:
    """The operators that take the most time by themselves, and what is left for all others."""
    table = Table(title=f"{figure['contender']}, {figure['tokens']:,} tokens, round {figure['round'] + 1}")
    for name in ("operator", "calls", "share of the time"):
        table.add_column(name, justify="left" if name == "operator" else "right")
    if "failed" in figure:
        table.add_row(figure["failed"])
        return table
    first, others = figure["operators"][:OPERATORS], figure["operators"][OPERATORS:]
    rest = (f"{len(others)} others", sum(seconds for _, seconds, _ in others), sum(calls for *_, calls in others))
    total = sum(seconds for _, seconds, _ in figure["operators"])
    for name, seconds, calls in [*first, *([rest] if others else [])]:
        table.add_row(name, f"{calls:,}", f"{seconds / total:.1%}")
    return table


def generation_table(cases: dict[tuple[int, str], dict]) -> Table:
    table = Table()
    for name in ("tokens before", "contender", "ms a token", "ratio", "reading, tokens/s", "cache", "peak memory"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for (tokens, contender), case in cases.items():
        table.add_row(
            f"{tokens:,}",
            contender,
            f"{1e3 * case['seconds_per_token']:.2f}",
            f"{case['ratio']:.2f}",
            f"{case['reading_tokens_per_s']:,.0f}",
            f"{case['cache_bytes'] / 2**10:,.0f} KiB",
            f"{case['peak_memory'] / 2**20:,.0f} MiB",
        )
    return table


if __name__ == "__main__":
    run_main(main)
