"""Measure speed and memory of training, or of generation, side by side: python launch/benchmark.py

Each measurement runs in a new process, and contenders take turns for several rounds. The table shows medians over the
rounds, and ratios to the first contender of the same round. Contenders:
    infini:G     this model with G segments in a block, recomputed in the backward pass
    infini:auto  the same with the largest block that memory allows
    infini:all   this model, all segments at once, activations kept
    gpt-neo      transformers' GPT-Neo with eager attention; gpt-neo:sdpa and so on where transformers has that for it
    infini-transformer-pytorch   the PyPI package, memories not detached: pip install 'infini_ds[benchmark]'

--generation measures the time per token of transformers' generate(), greedy and with a cache, after prompts of these
lengths; --prompts of them at once. --profile shows in which operators a training step spends its time. --ranks 1 2 4
measures steps of so many processes that share one row (infini:G or infini:all), and counts the bytes that they send.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from rich.console import Console

from infini_ds.benchmarks.contenders import BASELINES, GENERATING, ModelShape, check_contender, is_infini
from infini_ds.benchmarks.measure import BenchmarkPlan
from infini_ds.benchmarks.ranks import RankCase
from infini_ds.benchmarks.run import benchmark_contenders, benchmark_ranks
from infini_ds.distributed.entry_point import run_main
from infini_ds.model.presets import preset_config
from infini_ds.utils.errors import UserError
from infini_ds.utils.paths import check_can_compile_cpp, make_output_folder, user_path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens in a row")
    parser.add_argument("--contenders", nargs="+", help="default: infini:all, infini:1, infini:auto and the others")
    parser.add_argument("--segment-length", type=int, default=128)
    parser.add_argument("--rule", default="linear", help="memory rule, such as linear or delta (default: linear)")
    parser.add_argument("--preset", help="take width, layers and heads of a preset, such as 33m")
    for name, number in (("width", 256), ("layers", 4), ("heads", 4), ("vocabulary", 5000)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--steps", type=int, default=3, help="steps in a measurement, which takes their median")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1, help="with --generation: prompts of a batch (default: 1)")
    parser.add_argument("--compile", action="store_true", help="compile this model's layers")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--generation", action="store_true", help="measure generation instead of training")
    kind.add_argument("--profile", action="store_true", help="show the share of each operator in a training step")
    kind.add_argument("--ranks", type=int, nargs="+", help="numbers of processes that share a row (default: infini:8)")
    parser.add_argument(
        "--out", type=user_path, default=Path("runs/benchmark"), help="folder for measurements and plot"
    )
    args = parser.parse_args()
    args.lengths = args.lengths or ([128, 1000, 3000] if args.generation else [1024, 4096, 16384])
    if args.contenders is None:
        of_training = ["infini:8"] if args.ranks else ["infini:all", "infini:1", "infini:auto", *BASELINES]
        args.contenders = list(GENERATING) if args.generation else of_training
    sizes = ("lengths", "segment_length", "width", "layers", "heads", "vocabulary")
    for name in (*sizes, "steps", "rounds", "prompts", "ranks"):
        if getattr(args, name) is None:
            continue
        if min(value if isinstance(value := getattr(args, name), list) else [value]) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    for contender in args.contenders:
        check_contender(contender)
        if args.generation and not is_infini(contender) and contender not in GENERATING:
            raise UserError(f"--contenders {contender}: --generation measures infini:G and gpt-neo only")
    if args.ranks and not (len(args.contenders) == 1 and re.fullmatch(r"infini:(all|\d+)", args.contenders[0])):
        raise UserError(f"--contenders {' '.join(args.contenders)}: --ranks measures one of infini:G and infini:all")
    if args.ranks and args.compile:
        raise UserError("--compile: --ranks measures layers that are not compiled; leave it out")
    if args.compile and not torch.cuda.is_available():
        check_can_compile_cpp("--compile")
    return args


def model_shape(args: argparse.Namespace) -> ModelShape:
    width, layers, heads = args.width, args.layers, args.heads
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    try:
        if args.preset:
            config = preset_config(args.preset)
            width, layers, heads = config.hidden_size, config.num_layers, config.num_heads
        if width % heads:
            raise UserError(f"--width {width} is not divisible by --heads {heads}")
        shape = ModelShape(
            width, layers, heads, args.vocabulary, args.segment_length, args.rule, precision, args.compile
        )
        shape.config()
    except ValueError as error:
        raise UserError(str(error)) from error
    return shape


def main() -> None:
    args = parse_arguments()
    shape = model_shape(args)
    console = Console(width=None if sys.stdout.isatty() else 120)
    make_output_folder(args.out)
    if args.ranks:
        block = args.contenders[0].removeprefix("infini:")
        segments = None if block == "all" else int(block)
        cases = [RankCase(tokens, ranks, segments) for tokens in args.lengths for ranks in args.ranks]
        benchmark_ranks(cases, shape, args.steps, args.rounds, args.out, console)
    else:
        kind = "generation" if args.generation else "profile" if args.profile else "training"
        plan = BenchmarkPlan(
            kind, tuple(args.contenders), tuple(args.lengths), shape, args.steps, args.rounds, args.prompts
        )
        benchmark_contenders(plan, args.out, console)
    console.print(f"Written to {args.out}")


if __name__ == "__main__":
    run_main(main)
