"""Recall that needs the memory: facts, segments of filler, a question. Accuracy by the number of segments in between.

The examples are those of `data_prep.synthetic`, in the tokens of the evaluated model: `segments` segments of filler lie
between the last fact and the first question. An answer is correct if greedy decoding gives all of its tokens.
"""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean

from data_prep.synthetic.examples import IntRange
from data_prep.synthetic.specs import parse_task
from data_prep.synthetic.tasks import KeyValueTask, Pairs, Passkey, RecallTask, evaluation_seed
from data_prep.synthetic.words import KEYS
from infini_ds.data.batches import batches_by_length, pad_documents
from infini_ds.distributed import collectives
from infini_ds.evaluation.accuracy import DEPTHS, AccuracyResult, AccuracyTask, Point, Scores, score_points
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.plots import plt, save_figure
from infini_ds.evaluation.scoring import greedy_answers, memory_settings, segment_length
from infini_ds.evaluation.task import EvaluationContext, add_integer, register_task
from infini_ds.training.recall import rows_with_answers
from infini_ds.utils.errors import UserError

DEFAULT_TASKS = ("passkey", "pairs,queries=4", "variables", "question,order=first", "question,order=last")


@dataclass(frozen=True)
class RecallPoint:
    """One length and depth of a recall task: a fraction `depth` of the `segments` of filler is before the facts."""

    name: str
    task: RecallTask
    segments: int
    depth: float


@register_task
class Recall(AccuracyTask):
    name = "recall"
    help = "accuracy by segments between fact and question, with the memory on, off, and that of another document"
    lengths = "segments between"

    def add_arguments(self, parser: argparse._ArgumentGroup) -> None:
        defaults = f"(default: {' '.join(DEFAULT_TASKS)})"
        parser.add_argument("--recall", nargs="+", default=DEFAULT_TASKS, metavar="TASK", help=defaults)
        add_integer(parser, "--segments", 0, [1, 4, 16, 64], "segments of filler")
        add_integer(parser, "--examples", 2, 64, "of each task, length and depth")
        pairs = "evaluate each pairs task of --recall with these numbers of pairs, such as 4 8 16 32 64"
        add_integer(parser, "--pairs", 1, [], pairs, shown="the task's own")

    def run(self, model: EvaluatedModel, context: EvaluationContext) -> AccuracyResult:
        given = context.arguments
        names = with_numbers_of_pairs(given.recall, given.pairs)
        return evaluate_recall(model, names, sorted(set(given.segments)), given.examples, context)

    def plot(self, result: AccuracyResult, folder: Path) -> None:
        super().plot(result, folder)
        plot_by_pairs(result, folder / "recall_by_pairs.png")


def with_numbers_of_pairs(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Return the recall tasks with each pairs task once for each number of pairs, or as they are without numbers.

    Raises:
        UserError: no task is a pairs task, or a number is larger than that of all keys.
    """
    expanded = []
    for name in names:
        task = parse_task(name)
        if not isinstance(task, Pairs):
            expanded.append(name)
            continue
        for number in sorted(set(numbers)):
            if number > len(KEYS):
                raise UserError(f"--pairs {number}: there are {len(KEYS)} keys; give at most so many pairs")
            kept = [option for option in name.split(",") if not option.startswith(("pairs=", "keys="))]
            keys = [f"keys={max(task.keys, number)}"] if max(task.keys, number) != KeyValueTask.keys else []
            expanded.append(",".join([*kept, f"pairs={number}", *keys]))
        if not numbers:
            expanded.append(name)
    if numbers and not any(isinstance(parse_task(name), Pairs) for name in names):
        raise UserError(
            f"--pairs {numbers[0]}: no task of --recall has pairs; add pairs, as in --recall pairs,queries=4"
        )
    return list(dict.fromkeys(expanded))


def plot_by_pairs(result: AccuracyResult, file: Path) -> None:
    """Plot the accuracy with the memory on by number of pairs, a curve for each length, if numbers differ."""
    accuracy: dict[int, dict[int, float]] = {}
    for name, task in result.tasks.items():
        parsed = parse_task(name)
        if isinstance(parsed, Pairs) and parsed.pairs.low == parsed.pairs.high:
            for point in task.points:
                accuracy.setdefault(point.segments, {})[parsed.pairs.low] = point.accuracy["on"]
    numbers = sorted({number for of_length in accuracy.values() for number in of_length})
    if len(numbers) < 2:
        return
    figure, axes = plt.subplots(layout="constrained")
    colors = plt.get_cmap("viridis")
    for index, (segments, of_length) in enumerate(sorted(accuracy.items())):
        places = [numbers.index(number) for number in sorted(of_length)]
        values = [of_length[number] for number in sorted(of_length)]
        color = colors(0.85 * index / max(1, len(accuracy) - 1))
        axes.plot(places, values, marker="o", markersize=4, color=color, label=str(segments))
    axes.set_xticks(range(len(numbers)), [str(number) for number in numbers])
    axes.set(ylim=(-0.03, 1.03), xlabel="pairs in the text", ylabel="accuracy, memory on", title="Recall by pairs")
    axes.legend(title="segments between")
    save_figure(figure, file)


def evaluate_recall(
    model: EvaluatedModel, names: Sequence[str], segments: Sequence[int], examples: int, context: EvaluationContext
) -> AccuracyResult:
    """Evaluate each task at each length.

    Args:
        names: recall tasks, as `data_prep.synthetic.specs.parse_task` reads them.
        segments: lengths of the filler.
        examples: at each point.
    Raises:
        UserError: a task is unknown, or the tokenizer splits every word of the filler.
    """
    S, seed = segment_length(model.model), evaluation_seed(context.seed)
    points = []
    for point in (point for name in names for point in points_of(name, segments, S)):
        options = {"task": repr(point.task), "seed_of_examples": seed}
        compute = partial(compute_scores, model, point.task, examples, seed, context.batch_tokens)
        points.append(Point(point.name, point.segments, point.depth, point.task.chance, options, compute))
    return score_points("recall", points, context, examples, S, "generated by data_prep.synthetic")


def points_of(name: str, segments: Sequence[int], segment_length: int) -> Iterator[RecallPoint]:
    """Yield the points of a recall task: one for each length, and for the passkey one for each length and depth."""
    task = parse_task(name)
    for number in segments:
        for depth in DEPTHS if isinstance(task, Passkey) and number else (0.0,):
            before = round(depth * number * segment_length)
            after = number * segment_length - before
            placed = replace(task, distance=IntRange(after, after))
            yield RecallPoint(
                name, replace(placed, before=IntRange(before, before)) if before else placed, number, depth
            )


def compute_scores(model: EvaluatedModel, task: RecallTask, examples: int, seed: int, batch_tokens: int) -> Scores:
    """Compute the accuracy over all answers of some examples, in each setting of the memory."""
    tokenize = cache(lambda text: model.tokenizer.encode(text, add_special_tokens=False))
    drawn = [task.example(seed, index, tokenize) for index in range(examples)]
    rows, answers = rows_with_answers(drawn, model.start_ids)
    batches = batches_by_length(list(map(len, rows)), batch_tokens)
    accuracy = {}
    for setting in memory_settings(model.model):
        correct = []
        for batch in collectives.split_across_ranks(batches):
            # The other document is the next example, which has other facts.
            partners = [(i + 1) % examples for i in batch] if setting == "other" else []
            both = pad_documents([rows[i] for i in batch + partners])
            own, other = both[: len(batch)], both[len(batch) :] if partners else None
            correct.append(greedy_answers(model.model, own, [answers[i] for i in batch], setting, other))
        gathered = collectives.gather_items(correct)
        accuracy[setting] = fmean(answer for batch in gathered for row in batch for answer in row)
    return Scores(
        tokens=max(map(len, rows)),
        answers=sum(map(len, answers)),
        accuracy=accuracy,
        data=hashlib.sha256("\n".join(example.text for example in drawn).encode()).hexdigest(),
    )
