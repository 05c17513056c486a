"""What a model can do, and what its memory is worth: one command, one evaluation.json, one table, plots.

python launch/evaluate.py runs/tiny                              a run, one of its checkpoints, or an exported folder
python launch/evaluate.py gpt2 --tasks blimp --blimp BLIMP/data  any causal model of Hugging Face, as a baseline
torchrun --nproc-per-node 8 launch/evaluate.py runs/tiny         shared out among ranks; deepspeed and srun do as well

Tasks:
    position  loss by position on long documents, with the memory, without it, and with that of another document
    recall    answers by the number of segments between fact and question, under the same three settings
    blimp     which of two sentences is right, scored as lm-evaluation-harness does
    glue      GLUE and SuperGLUE, fine-tuned as the BabyLM pipeline does

What is finished is kept in the folder of the results, and passed over when it is asked for again.
"""

import argparse
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from infini_ds.config.training_data import find_sources
from infini_ds.distributed import collectives
from infini_ds.distributed.entry_point import run_main
from infini_ds.distributed.environment import detect_environment, set_cpu_threads, shutdown
from infini_ds.evaluation import blimp, finetuning, glue, glue_texts, position, recall, summary
from infini_ds.evaluation.model_loading import EvaluatedModel, load
from infini_ds.evaluation.result_cache import EVALUATION, ResultCache, earlier_tasks, write_json
from infini_ds.utils.errors import UserError

CACHE = "data/cache"  # where shards of an address are kept


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="an export, a run, a checkpoint, or a causal model's folder or name on the hub")
    add("--tasks", nargs="+", default=["position"], metavar="TASK", help=f"of {', '.join(TASKS)} (default: position)")
    add("--out", type=Path, help="folder of the results (default: evaluation/ inside the model's)")
    add("--seed", type=int, default=0, help="of recall and glue (default: %(default)s)")
    add("--batch-tokens", type=int, default=16_384, help="at a time; no result depends on it (default: %(default)s)")
    add("--data", help="position: a folder that data_prep made (default: the run's own)")
    add("--rows", type=int, default=64, help="position: validation rows, 0 for all (default: %(default)s)")
    add("--recall", nargs="+", default=recall.TASKS, metavar="TASK", help=f"(default: {' '.join(recall.TASKS)})")
    add("--segments", type=int, nargs="+", default=[1, 4, 16, 64], help="recall: of filler (default: 1 4 16 64)")
    add("--examples", type=int, default=64, help="recall: of each task and length (default: %(default)s)")
    add("--blimp", default=blimp.HUB, help="folder of JSONL files, or a data set on the hub (default: %(default)s)")
    add("--glue", default=glue_texts.HUB, help="folder of JSON lines, or hub (default: %(default)s)")
    add("--glue-tasks", nargs="+", default=list(glue.TASKS), metavar="TASK", help=f"of {', '.join(glue.TASKS)}")
    add("--finetune", nargs="+", default=[], metavar="key=value", help="glue: such as learning_rate=5e-5 epochs=10")
    add("--limit", type=int, default=0, help="blimp: pairs of a paradigm; glue: examples of a split (default: all)")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    args = parser.parse_args()
    for task in args.tasks:
        if task not in TASKS:
            raise UserError(f"--tasks {task} is not one of {', '.join(TASKS)}")
    for name, least in (("batch_tokens", 1), ("rows", 0), ("limit", 0), ("seed", 0), ("examples", 2), ("segments", 0)):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < least:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    return args


def run_position(args: argparse.Namespace, subject: EvaluatedModel, session: ResultCache) -> dict:
    if args.data is None and subject.run is None:
        raise UserError(f"{args.model} is no run, so its data are not known: name a folder of data_prep with --data")
    sources = position.sources_of(subject.run) if args.data is None else find_sources(args.data, [], CACHE)
    return position.measure(subject, sources, args.rows or None, session)


def run_blimp(args: argparse.Namespace, subject: EvaluatedModel, session: ResultCache) -> dict:
    return blimp.measure(subject, blimp.read_paradigms(args.blimp, args.limit or None), args.blimp, session)


def run_recall(args: argparse.Namespace, subject: EvaluatedModel, session: ResultCache) -> dict:
    return recall.measure(subject, list(args.recall), sorted(set(args.segments)), args.examples, args.seed, session)


def run_glue(args: argparse.Namespace, subject: EvaluatedModel, session: ResultCache) -> dict:
    settings = finetuning.settings_of(args.finetune)
    return glue.measure(subject, args.glue, args.glue_tasks, settings, args.seed, args.limit or None, session)


TASKS = {"position": run_position, "recall": run_recall, "blimp": run_blimp, "glue": run_glue}


def main() -> None:
    args = options()
    process = detect_environment()
    set_cpu_threads(process)
    collectives.init_gloo(process)
    subject = load(args.model, process.device)
    folder = args.out or subject.folder
    session = ResultCache(folder, subject.identity(), args.batch_tokens)
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
        asked = {task: evaluation["tasks"][task] for task in args.tasks}
        summary.picture(asked, folder)
        summary.show(evaluation["model"], asked, Console(width=None if sys.stdout.isatty() else 120))
        print(f"Written to {folder}")
    shutdown()


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")}


if __name__ == "__main__":
    run_main(main)
