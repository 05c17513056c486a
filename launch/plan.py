"""Plan a run before a GPU is asked for: memory of a rank by part, FLOPs, days, traffic, and which blocks fit.

python launch/plan.py [--config launch/recipes/1.3b.yaml] [key=value ...] [--gpu a100-80g] [--gpus 8]

Without --config and a batch (batch.rows or batch.tokens) it plans the recipe that fits this machine's hardware.
Needs no GPU, and no prepared data if --sequence-length (or plan.sequence_length of the recipe) is given. Exits with 1
if a step does not fit.
"""

import argparse
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from infini_ds.config.default_recipe import load_recipe_or_default, with_data_to_prepare
from infini_ds.config.lr_schedule import gate_reach
from infini_ds.distributed.entry_point import run_main
from infini_ds.planning.hardware import GPUS
from infini_ds.planning.memory_estimate import HEADROOM
from infini_ds.planning.plan import GIB, Plan, make_plan
from infini_ds.planning.traffic import NODE_GPUS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a recipe, such as launch/recipes/1.3b.yaml")
    parser.add_argument("--gpu", help=f"{', '.join(GPUS)} (default: plan.gpu of the recipe, or this machine)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a GPU that is not in this list")
    parser.add_argument("--gpus", type=int, help="number of ranks (default: plan.gpus of the recipe)")
    parser.add_argument("--mfu", type=float, help="share of peak FLOPS that training reaches (default: plan.mfu)")
    parser.add_argument("--sequence-length", type=int, help="tokens of a row, if the data is not prepared yet")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    args = parser.parse_intermixed_args()
    given = {name: getattr(args, name) for name in ("gpu", "memory", "gpus", "mfu", "sequence_length")}
    flags = [f"plan.{name}={value}" for name, value in given.items() if value is not None]
    if args.gpu and args.memory is None:
        flags.append("plan.memory=null")
    recipe = with_data_to_prepare(load_recipe_or_default(args.config, [*args.overrides, *flags]))
    plan = make_plan(recipe)
    console = Console(highlight=False)
    console.print(summary_table(plan))
    console.print(memory_table(plan))
    if plan.estimate.host:
        console.print(f"and {plan.estimate.host / GIB:.1f} GiB of the host's memory for each rank of a node")
    console.print(fitting_table(plan))
    console.print(verdict(plan), soft_wrap=True)
    sys.exit(0 if plan.fits else 1)


def summary_table(plan: Plan) -> Table:
    """The model, the tokens, a step, a block, FLOPs and days."""
    run, work, shape = plan.run, plan.work, plan.run.batch_shape
    table = Table(
        title=f"{run.recipe.name} on {run.dims.world_size} x {plan.device.name}", show_header=False, title_style="b"
    )
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("parameters", f"{plan.parameters:,}")
    per_parameter = plan.tokens / plan.parameters
    table.add_row("tokens", f"{plan.tokens:,} in {run.recipe.steps:,} steps, {per_parameter:.1f} per parameter")
    micro_batches = f"{shape.accumulation} x {shape.micro_rows} rows of {work.tokens:,} tokens"
    ranks = f"{run.dims.world_size} ranks" + (f" ({work.sequence} on each row)" if work.sequence > 1 else "")
    table.add_row("a step", f"{ranks} x {micro_batches}")
    kept = "recomputed block by block" if work.checkpointing else "all activations kept"
    of_ranks = f"{work.sequence} ranks x " if work.sequence > 1 else ""
    segments = f"{of_ranks}{work.block_segments} of {work.segments} segments of {work.segment_length}"
    table.add_row("a block", f"{segments}, {kept}, {work.precision}")
    table.add_row("FLOPs per token", f"{plan.flops_per_token:.3g}")
    days = plan.days
    took = "unknown: no peak FLOPS for this device and precision" if days is None else f"{days:,.2f} without validation"
    table.add_row(f"days at {run.recipe.plan.mfu:.0%} MFU", took)
    for name, text in traffic_rows(plan):
        table.add_row(name, text)
    gate_init = run.model_config.gate_init
    table.add_row("gates", f"can move by {gate_reach(run.recipe):.1f} at most, from {gate_init:g}")
    return table


def traffic_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """What a rank sends to others in a step."""
    if plan.run.dims.world_size > 1:
        yield "sent for ZeRO", f"{plan.zero_bytes / 1e9:.3g} GB a step by each rank: gradients and weights"
    traffic, links, seconds = plan.sequence_traffic, plan.device.links, plan.step_seconds
    if traffic.ranks == 1:
        return
    text = f"{traffic.sent / 1e9:.3g} GB a step by each rank: {traffic.times:,} layers of blocks x "
    text += f"{traffic.ranks - 1} other ranks x {sum(traffic.gathers):,} bytes"
    if links is not None and seconds is not None:
        names = links[0].name if traffic.ranks <= NODE_GPUS else " and ".join(link.name for link in links)
        text += f"; {traffic.seconds(*links):.2g} of the step's {seconds:.2g} s on {names}, if nothing overlaps"
    yield "sent for the rows", text


def memory_table(plan: Plan) -> Table:
    """GiB of a rank by part, at the three moments that may be the peak."""
    estimate = plan.estimate
    moments = {
        "computing": estimate.computing,
        "reducing gradients": estimate.reducing,
        "optimizer's step": estimate.step,
    }
    table = Table("GiB of a rank", title="Memory", title_style="b", show_footer=True)
    for name, parts in moments.items():
        table.add_column(name, footer=f"{sum(parts.values()) / GIB:.2f}", justify="right")
    table.columns[0].footer = "total"
    for part in dict.fromkeys(part for parts in moments.values() for part in parts):
        table.add_row(part, *(f"{parts[part] / GIB:.2f}" if part in parts else "" for parts in moments.values()))
    return table


def fitting_table(plan: Plan) -> Table:
    """The largest block that fits for each micro-batch."""
    table = Table("micro_rows", "segments_per_block", "GiB", title="What fits", title_style="b")
    for column in table.columns:
        column.justify = "right"
    for block in plan.fitting_blocks():
        peak = "" if block.peak is None else f"{block.peak / GIB:.1f}"
        table.add_row(str(block.rows), "none" if block.segments is None else str(block.segments), peak)
    return table


def verdict(plan: Plan) -> str:
    """Whether a step fits, and if not, what to change."""
    needed = (
        f"A step takes {plan.estimate.peak / GIB:.1f} GiB of the {plan.memory_limit / GIB:.1f} that a rank may take"
    )
    headroom = f"(headroom: {HEADROOM:.0%} of {plan.device.memory / GIB:.1f})"
    if plan.fits:
        return f"{needed} {headroom}: it fits."
    remedy = plan.remedy()
    advice = f"try {remedy}" if remedy else "use a smaller model.preset, shorter rows, or a GPU with more memory"
    return f"{needed} {headroom}: it does not fit; {advice}."


if __name__ == "__main__":
    run_main(main)
