"""What a model can do, and what its memory is worth: one command, one evaluation.json, one table, plots.

python launch/evaluate.py runs/tiny                              a run, one of its checkpoints, or an exported folder
python launch/evaluate.py gpt2 --tasks blimp --blimp BLIMP/data  any causal model of Hugging Face, as a baseline
torchrun --nproc-per-node 8 launch/evaluate.py runs/tiny         shared out among ranks; deepspeed and srun do as well

Tasks: position (loss by position, with the memory, without, and with another document's). What is finished is kept,
and passed over when the same command runs again.
"""

import argparse
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from infini_ds.data.sources import find_sources
from infini_ds.evaluation import blimp, glue, glue_texts, position, ranks, summary
from infini_ds.evaluation.finetuning import settings_of
from infini_ds.evaluation.session import EVALUATION, Session, earlier_tasks, write_json
from infini_ds.evaluation.subject import Subject, load
from infini_ds.training.processes import disconnect, identify, launch, share_threads

CACHE = "data/cache"  # where shards of an address are kept


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an export, a run, a checkpoint, or a causal model's folder or name on the hub")
    parser.add_argument("--tasks", nargs="+", default=["position"], metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--out", type=Path, help="folder of the results (default: evaluation/ inside the model's)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="at a time; no result depends on it")
    parser.add_argument("--data", help="position: a folder that data_prep made (default: the run's own)")
    parser.add_argument("--rows", type=int, default=64, help="position: validation rows, 0 for all")
    parser.add_argument("--blimp", default=blimp.HUB, help="blimp: folder of JSONL files, or a data set on the hub")
    parser.add_argument("--glue", default=glue_texts.HUB, help="glue: folder of JSON lines (default: %(default)s)")
    parser.add_argument("--glue-tasks", nargs="+", default=list(glue.TASKS), metavar="TASK", help="(default: all ten)")
    parser.add_argument("--finetune", nargs="+", default=[], metavar="KEY=VALUE", help="glue: such as epochs=3")
    parser.add_argument(
        "--limit", type=int, default=0, help="blimp: pairs of each paradigm; glue: examples of each split; 0 for all"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    args = parser.parse_args()
    for task in args.tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks {task} is not one of {', '.join(TASKS)}")
    for name, least in (("batch_tokens", 1), ("rows", 0), ("limit", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    return args


def run_position(args: argparse.Namespace, subject: Subject, session: Session) -> dict:
    if args.data is None and subject.run is None:
        raise ValueError(f"{args.model} is no run, so its data are not known: name a folder of data_prep with --data")
    sources = position.sources_of(subject.run) if args.data is None else find_sources(args.data, [], CACHE)
    return position.measure(subject, sources, args.rows or None, session)


def run_blimp(args: argparse.Namespace, subject: Subject, session: Session) -> dict:
    return blimp.measure(subject, blimp.read_paradigms(args.blimp, args.limit or None), args.blimp, session)


def run_glue(args: argparse.Namespace, subject: Subject, session: Session) -> dict:
    settings = settings_of(args.finetune)
    return glue.measure(subject, args.glue, args.glue_tasks, settings, args.seed, args.limit or None, session)


TASKS = {"position": run_position, "blimp": run_blimp, "glue": run_glue}


def main() -> None:
    args = options()
    process = identify()
    share_threads(process)
    ranks.connect(process)
    subject = load(args.model, process.device)
    folder = args.out or subject.folder
    session = Session(folder, subject.sha256, args.batch_tokens)
    command = shlex.join(["python", *sys.argv])
    evaluation = {
        "model": subject.facts(),
        "command": command,
        "seed": args.seed,
        "versions": versions(),
        "tasks": earlier_tasks(folder, subject.sha256),
    }
    for task in dict.fromkeys(args.tasks):
        result = TASKS[task](args, subject, session)
        evaluation["tasks"][task] = result | {"command": command, "seed": args.seed}
        if process.is_first:
            write_json(folder / EVALUATION, evaluation)
    if process.is_first:
        summary.picture(evaluation, folder)
        summary.show(evaluation, Console(width=None if sys.stdout.isatty() else 120))
        print(f"Written to {folder}")
    disconnect()


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")}


if __name__ == "__main__":
    launch(main)
