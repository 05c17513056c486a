"""A needle in a haystack: a pass key in real text of up to thousands of segments, at several depths.

The text is a number of complete segments and the question comes after it, so that the answer passes through the memory
at every depth. It is read once, in bounded memory, whatever its length. An answer is correct if greedy decoding gives
all of its tokens.
"""

import argparse
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Group
from rich.table import Table

from data_prep.synthetic.haystack import Haystack, hide_at_depth
from data_prep.synthetic.tasks import PASSKEY_QUESTION, passkey_fact
from data_prep.synthetic.words import DIGITS
from infini_ds.evaluation.accuracy import DEPTHS, AccuracyResult, AccuracyTask, Point, plot_depths, score_points
from infini_ds.evaluation.haystack_options import add_haystack_argument, read_haystack
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.plots import plt, save_figure
from infini_ds.evaluation.scoring import segment_length
from infini_ds.evaluation.streamed_answers import StreamedExample, score_streamed
from infini_ds.evaluation.tables import MEMORY_LABELS, new_table
from infini_ds.evaluation.task import EvaluationContext, add_integer, register_task
from infini_ds.utils.errors import UserError


@register_task
class Needle(AccuracyTask):
    name = "needle"
    help = "accuracy of a pass key in real text by depth and length, with the memory on, off, and swapped"
    lengths = "segments of text"

    def add_arguments(self, parser: argparse._ArgumentGroup) -> None:
        add_haystack_argument(parser)
        lengths = "segments of text, pass key included; any number"
        add_integer(parser, "--needle-segments", 1, [1, 4, 16, 64], lengths)
        depths = [round(100 * depth) for depth in DEPTHS]
        add_integer(parser, "--needle-depths", 0, depths, "percent of the text before the pass key", "PERCENT")
        add_integer(parser, "--needle-digits", 1, 5, "of the pass key")
        add_integer(parser, "--needle-examples", 2, 32, "of each length and depth")

    def run(self, model: EvaluatedModel, context: EvaluationContext) -> AccuracyResult:
        given = context.arguments
        depths = [percent / 100 for percent in sorted(set(given.needle_depths))]
        if depths[-1] > 1:
            raise UserError(f"--needle-depths {round(100 * depths[-1])} must be at most 100")
        return evaluate_needle(
            model,
            given.haystack,
            sorted(set(given.needle_segments)),
            depths,
            given.needle_digits,
            given.needle_examples,
            context,
        )

    def table(self, result: AccuracyResult) -> Group:
        return Group(self.table_by_length(result), self.table_by_depth(result))

    def table_by_depth(self, result: AccuracyResult) -> Table:
        """Return the accuracy with the memory on, a line for each length and a column for each depth."""
        (task,) = result.tasks.values()
        depths = sorted({point.depth for point in task.points})
        table = new_table("memory on, by depth of the pass key", self.lengths, *(f"{depth:.0%}" for depth in depths))
        for segments, points in task.by_segments().items():
            accuracy = {point.depth: f"{point.accuracy['on']:.3f}" for point in points}
            table.add_row(f"{segments:,}", *(accuracy[depth] for depth in depths))
        return table

    def plot(self, result: AccuracyResult, folder: Path) -> None:
        """Plot the accuracy as a grid of lengths and depths, one panel for each setting of the memory."""
        (task,) = result.tasks.values()
        settings = list(task.points[0].accuracy)
        width = 1.6 + 0.62 * len(task.by_segments())
        figure, panels = plt.subplots(
            1, len(settings), figsize=(width * len(settings) + 0.4, 3.6), squeeze=False, layout="constrained"
        )
        for axes, setting in zip(panels.flat, settings, strict=True):
            plot_depths(axes, task, setting)
            axes.set_title(MEMORY_LABELS[setting], fontsize=10)
            if axes is not panels[0, 0]:
                axes.set_ylabel("")
        save_figure(figure, folder / "needle.png")


def evaluate_needle(
    model: EvaluatedModel,
    source: str,
    segments: Sequence[int],
    depths: Sequence[float],
    digits: int,
    examples: int,
    context: EvaluationContext,
) -> AccuracyResult:
    """Evaluate each length and depth.

    Args:
        source: of the text, as `data_prep` names it.
    Raises:
        UserError: the source cannot be used, or a text is too short for the pass key.
    """
    S, seed = segment_length(model.model), context.seed
    haystack = read_haystack(model, source, segments[-1] * S)
    points = []
    for number in segments:
        for depth in depths:
            make = partial(make_example, model, haystack, number * S, depth, digits, seed)
            try:
                make(0)
            except TooShortError as error:
                raise UserError(
                    f"--needle-segments {number}: the pass key has {error} tokens, more than the {number * S} of the "
                    "text; give more segments"
                ) from None
            options = {"haystack": source, "text": haystack.sha256, "segments": number, "depth": depth}
            options |= {"digits": digits}
            compute = partial(score_streamed, model, make, examples, context.batch_tokens)
            points.append(Point("needle", number, depth, 10.0**-digits, options, compute))
    return score_points("needle", points, context, examples, S, source)


class TooShortError(Exception):
    """The text has no place for the pass key, which has so many tokens."""


def make_example(
    model: EvaluatedModel, haystack: Haystack, tokens: int, depth: float, digits: int, seed: int, number: int
) -> StreamedExample:
    """Return an example whose text, start token and pass key included, has `tokens` tokens.

    The text and the pass key depend on seed, number and length, and not on the depth.

    Raises:
        TooShortError: it has no place for the pass key.
    """
    rng = random.Random(f"needle {seed} {number} {tokens}")
    key = rng.choices(DIGITS, k=digits)

    def tokenize(words: Sequence[str]) -> list[int]:
        return list(model.tokenizer.encode("".join(f" {word}" for word in words), add_special_tokens=False))

    fact = tokenize(passkey_fact(key))
    left = tokens - len(model.start_ids) - len(fact)
    if left < 0:
        raise TooShortError(len(fact) + len(model.start_ids))
    pieces = hide_at_depth(fact, haystack.draw(rng, left), depth)
    text = [*model.start_ids, *(token for piece in pieces for token in piece)]
    return StreamedExample(text, tokenize(PASSKEY_QUESTION), tokenize(key))
