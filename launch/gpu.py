"""Check and measure what this machine's GPU gives, in ten minutes and without network: python launch/gpu.py

Checks bf16 against fp32, the cache of generation, flex attention, compiled layers, and the memory plan; then measures
speed of training and generation beside other models, and where the time of a step goes. Each case runs in a process of
its own on the first GPU, and each section has its time: what one leaves over, the next ones may take. A case that
fails, or that needs what is not installed, does not stop the others.

Writes gpu.json and gpu.md to --out, and with --write the same tables into a document. --device cpu runs all of it in
small. Exits with 1 if a check did not pass, or anything failed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from infini_ds.benchmarks.gpu.machine import Machine
from infini_ds.benchmarks.gpu.report import BEGIN, END, Report, summary
from infini_ds.benchmarks.gpu.runner import is_failure, run_sections
from infini_ds.benchmarks.gpu.sections import Outcome, Section, all_sections, full_form, small_form
from infini_ds.benchmarks.process import run_worker
from infini_ds.distributed.entry_point import run_main
from infini_ds.utils.atomic import write_json_atomic, write_text_atomic
from infini_ds.utils.documents import insert_between, read_document
from infini_ds.utils.errors import UserError, did_you_mean
from infini_ds.utils.paths import make_output_folder, user_path

MINUTES = 10.0
SECONDS_FOR_THE_MACHINE = 120  # to import everything for the first time and to measure a matrix product
STYLES = {"passed": "green", "measured": "green", "failed": "bold red", "error": "bold red"}  # others: yellow


def parse_arguments() -> argparse.Namespace:
    names = [section.name for section in all_sections(small_form(), compiles=True)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the small form, without a GPU")
    parser.add_argument("--small", action="store_true", help="tiny models on the GPU too, in a few minutes")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all sections (default: %(default)g)")
    parser.add_argument("--sections", nargs="+", default=names, help=f"some of {', '.join(names)}")
    parser.add_argument("--out", type=user_path, default=Path("runs/gpu"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--write", type=user_path, metavar="FILE", help="put the tables between this document's markers"
    )
    args = parser.parse_args()
    for name in args.sections:
        if name not in names:
            raise UserError(f"--sections {name} is unknown{did_you_mean(name, names)}")
    if not 0 < args.minutes < float("inf"):
        raise UserError(f"--minutes {args.minutes} must be a time above 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch sees no GPU here: start it on a machine with one and a CUDA build of torch, or run "
            "the small form with --device cpu"
        )
    if args.write:
        insert_between(read_document(args.write), BEGIN, END, "")
    return args


def main() -> None:
    args = parse_arguments()
    console, started = Console(highlight=False), time.monotonic()
    make_output_folder(args.out)
    run = partial(run_worker, hide_gpus=args.device == "cpu")
    machine = Machine(**run("machine", {}, SECONDS_FOR_THE_MACHINE))
    form = small_form() if args.small or args.device == "cpu" else full_form()
    compiles = "triton" in machine.packages and args.device == "cuda"
    sections = [section for section in all_sections(form, compiles) if section.name in args.sections]
    console.print(f"{machine.device}: the {form.name} form, at most {args.minutes:g} minutes")
    outcomes: list[Outcome] = []
    date = time.strftime("%Y-%m-%dT%H:%M:%S")
    left = 60 * args.minutes - (time.monotonic() - started)
    for outcome in run_sections(sections, max(left, 1.0), run):
        if not outcomes or outcomes[-1].section != outcome.section:
            console.print(next(one.title for one in sections if one.name == outcome.section), style="bold")
        outcomes.append(outcome)
        show(outcome, console)
        report = Report(machine, form.name, date, time.monotonic() - started, sections, outcomes)
        write_json_atomic(args.out / "gpu.json", report.to_json())
        write_text_atomic(args.out / "gpu.md", report.markdown())
    if args.write:
        args.write.write_text(insert_between(read_document(args.write), BEGIN, END, report.markdown()))
    sys.exit(conclude(outcomes, sections, args.out, console))


def show(outcome: Outcome, console: Console) -> None:
    name = " ".join(filter(None, (outcome.case.model, outcome.case.label)))
    if outcome.case.kind in ("training", "generation"):
        name += f", {outcome.case.arguments['tokens']:,} tokens"
    state = Text(f"  {outcome.state:14}", STYLES.get(outcome.state, "yellow"))
    console.print(state + f"{outcome.seconds:4.0f} s  {name}: {summary(outcome)}", soft_wrap=True)
    if outcome.state == "error":
        console.print(outcome.message, markup=False, soft_wrap=True)


def conclude(outcomes: Sequence[Outcome], sections: Sequence[Section], out: Path, console: Console) -> int:
    """Print what the outcomes amount to, and return the exit code."""
    failures = [one for one in outcomes if is_failure(one, sections)]
    passed = sum(one.state == "passed" for one in outcomes)
    skipped = sum(one.state in ("not possible", "out of time") for one in outcomes)
    console.print(f"Written to {out}/gpu.json and gpu.md")
    if failures:
        names = ", ".join(dict.fromkeys(one.section for one in failures))
        console.print(f"FAILED: {len(failures)} of {len(outcomes)} cases, in {names}", style="bold red", soft_wrap=True)
        return 1
    console.print(f"{passed} checks passed, {skipped} cases could not run (gpu.md says why)", style="bold green")
    return 0


if __name__ == "__main__":
    run_main(main)
