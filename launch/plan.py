"""What a run will take, before a GPU is asked for: memory of a rank by part, operations, days, and what fits.

python launch/plan.py --config launch/recipes/1.3b.yaml [key=value ...] [--gpu a100-80g] [--gpus 8]

Needs no GPU, and no data if --sequence-length (or plan.sequence_length in the recipe) is given. Exit code 1 if a step
does not fit.
"""

import argparse
import sys
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from infini_ds.config.lr_schedule import gate_reach
from infini_ds.config.recipe import Recipe, load_recipe
from infini_ds.config.resolve import resolve
from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.environment import detect_environment
from infini_ds.planning.hardware import memory_free, peak_flops, training_flops_per_token
from infini_ds.planning.memory_estimate import HEADROOM, Workload, ZeroSharding, parameters
from infini_ds.planning.plan import CARDS, Device, Plan, card

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a recipe, such as launch/recipes/1.3b.yaml")
    parser.add_argument("--gpu", help=f"{', '.join(CARDS)} (default: plan.gpu of the recipe, or this machine)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a GPU, for one that has no name here")
    parser.add_argument("--gpus", type=int, help="ranks (default: plan.gpus of the recipe)")
    parser.add_argument("--mfu", type=float, help="share of the peak that training will reach (default: plan.mfu)")
    parser.add_argument("--sequence-length", type=int, help="of rows, where the data is not there yet")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    args = parser.parse_intermixed_args()
    given = {name: getattr(args, name) for name in ("gpu", "memory", "gpus", "mfu", "sequence_length")}
    flags = [f"plan.{name}={value}" for name, value in given.items() if value is not None]
    if args.gpu and args.memory is None:
        flags.append("plan.memory=null")
    plan = make_plan(load_recipe(args.config, [*args.overrides, *flags]))
    show(plan)
    sys.exit(0 if plan.fits else 1)


def make_plan(recipe: Recipe) -> Plan:
    """
    Raises:
        UserError: the recipe's batch, model, card or DeepSpeed's JSON are not possible, or the data is not there and
            nothing says how long rows will be.
    """
    choice = recipe.plan
    named = choice.gpu is not None or choice.memory is not None
    ranks = replace(detect_environment(), rank=0, local_rank=0, world_size=choice.gpus, local_world_size=choice.gpus)
    run = resolve(recipe, ranks, require_data=False, device_type="cuda" if named else None)
    if choice.memory is not None:
        name = f"{choice.gpu or 'GPU'} of {choice.memory:g} GiB"
        flops = card(choice.gpu, run.precision).flops if choice.gpu else None
        device = Device(name, int(choice.memory * GIB), flops)
    elif choice.gpu is not None:
        device = card(choice.gpu, run.precision)
    else:
        kind = ranks.device.type
        device = Device(f"this machine ({kind})", memory_free(ranks), peak_flops(ranks.device, run.precision))
    sharding = ZeroSharding.from_json(run.deepspeed, choice.gpus)
    work = Workload.of(recipe, run.model_config, run.batch_shape, run.sequence_length, run.precision)
    return Plan(recipe, run.model_config, run.batch_shape, device, work, sharding)


def show(plan: Plan) -> None:
    recipe, work, shape = plan.recipe, plan.work, plan.shape
    console = Console(highlight=False)
    count, flops, days = parameters(plan.config), training_flops_per_token(plan.config), plan.days(recipe.plan.mfu)
    facts = Table(title=f"{recipe.name} on {shape.data_size} x {plan.device.name}", show_header=False, title_style="b")
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    facts.add_row("parameters", f"{count:,}")
    facts.add_row("tokens", f"{plan.tokens:,} in {recipe.steps:,} steps, {plan.tokens / count:.1f} a parameter")
    facts.add_row(
        "a step", f"{shape.data_size} ranks x {shape.accumulation} x {shape.micro_rows} rows of {work.tokens:,} tokens"
    )
    kept = "recomputed block by block" if work.checkpointing else "all kept"
    facts.add_row("a block", f"{work.block_segments} of {work.segments} segments of {work.segment_length}, {kept}, {work.precision}")
    facts.add_row("operations a token", f"{flops:.3g}")
    took = "not known: no peak for this device and precision" if days is None else f"{days:,.2f} without validation"
    facts.add_row(f"days at {recipe.plan.mfu:.0%} MFU", took)
    facts.add_row("gates", f"can move by {gate_reach(recipe):.1f} at most, from {plan.config.gate_init:g}")
    console.print(facts)

    memory = Table("GiB of a rank", title="Memory", title_style="b", show_footer=True)
    found = plan.estimate
    columns = {"computing": found.computing, "reducing gradients": found.reducing, "optimizer's step": found.step}
    for name, parts in columns.items():
        memory.add_column(name, footer=f"{sum(parts.values()) / GIB:.2f}", justify="right")
    memory.columns[0].footer = "together"
    for part in dict.fromkeys(part for parts in columns.values() for part in parts):
        cells = (f"{parts[part] / GIB:.2f}" if part in parts else "" for parts in columns.values())
        memory.add_row(part, *cells)
    console.print(memory)
    if found.host:
        console.print(f"and {found.host / GIB:.1f} GiB of the host's memory for each rank of a node")

    fitting = Table("micro_rows", "segments_per_block", "GiB", title="What fits", title_style="b")
    for column in fitting.columns:
        column.justify = "right"
    for rows, block, peak in plan.choices():
        fitting.add_row(f"{rows}", f"{block}" if block else "none", f"{peak / GIB:.1f}" if peak else "")
    console.print(fitting)

    needed = f"A step takes {found.peak / GIB:.1f} GiB of the {plan.room / GIB:.1f} that a rank may take"
    spare = f"({HEADROOM:.0%} of {plan.device.memory / GIB:.1f} are left free)"
    if plan.fits:
        console.print(f"{needed} {spare}: it fits.", soft_wrap=True)
        return
    remedy = plan.remedy()
    advice = f"try {remedy}" if remedy else "take a smaller model.preset, shorter rows, or a card with more memory"
    console.print(f"{needed} {spare}: it does not fit; {advice}.", soft_wrap=True)


if __name__ == "__main__":
    run_main(main)
