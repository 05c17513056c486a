"""bAbI hidden in books, as BABILong does it: reasoning over facts that lie hundreds of segments apart.

The facts of a story stand in order among sentences of real text, the question comes after it. The text is a number of
complete segments, so that all facts pass through the memory. It is read once, in bounded memory, whatever its length.
An answer is correct if greedy decoding gives all of its tokens.
"""

import argparse
import logging
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from data_prep.synthetic.babi import Question, Story, most_frequent_answers, read_babi
from data_prep.synthetic.haystack import Haystack, hide
from infini_ds.evaluation.accuracy import AccuracyResult, AccuracyTask, Point, score_points
from infini_ds.evaluation.haystack_options import read_haystack
from infini_ds.evaluation.model_loading import EvaluatedModel
from infini_ds.evaluation.scoring import segment_length
from infini_ds.evaluation.streamed_answers import StreamedExample, score_streamed
from infini_ds.evaluation.task import EvaluationContext, add_integer, register_task
from infini_ds.utils.errors import UserError
from infini_ds.utils.hashing import sha256_of_json

logger = logging.getLogger(__name__)


@register_task
class Babi(AccuracyTask):
    name = "babi"
    help = "accuracy on bAbI 1-5 hidden in the text of --haystack, by length, with the memory on, off, and swapped"
    lengths = "segments of text"
    baseline = "most frequent answer"

    def add_arguments(self, parser: argparse._ArgumentGroup) -> None:
        parser.add_argument(
            "--babi",
            type=os.path.expanduser,
            metavar="PATH",
            help="babi: folder or tar archive with qa1….txt, qa2….txt, …; of several splits the test or valid files",
        )
        add_integer(parser, "--babi-tasks", 1, [1, 2, 3, 4, 5], "numbers of bAbI's tasks")
        lengths = "segments of text, facts included; 0 is the story alone"
        add_integer(parser, "--babi-segments", 0, [0, 4, 16, 64], lengths)
        add_integer(parser, "--babi-examples", 2, 100, "of each task and length")

    def run(self, model: EvaluatedModel, context: EvaluationContext) -> AccuracyResult:
        given = context.arguments
        if given.babi is None:
            raise UserError("--tasks babi needs --babi PATH: the folder or archive of bAbI's files")
        try:
            stories = read_babi(given.babi, "evaluation")
        except UserError as error:
            raise UserError(f"--babi {error}") from None
        for number in given.babi_tasks:
            if number not in stories:
                known = ", ".join(map(str, sorted(stories)))
                raise UserError(f"--babi-tasks {number}: --babi {given.babi} has no file of it, but of {known}")
        chosen = {number: stories[number] for number in sorted(set(given.babi_tasks))}
        return evaluate_babi(
            model, chosen, given.haystack, sorted(set(given.babi_segments)), given.babi_examples, context, given.babi
        )


@dataclass(frozen=True)
class TokenizedQuestion:
    """A question in the tokens of a model."""

    facts: list[list[int]]
    question: list[int]
    answer: list[int]


def evaluate_babi(
    model: EvaluatedModel,
    stories: dict[int, list[Story]],
    source: str,
    segments: Sequence[int],
    examples: int,
    context: EvaluationContext,
    path: str,
) -> AccuracyResult:
    """Evaluate each task at each length, on questions whose facts fit into the text.

    Args:
        stories: by number of the task. source: of the text, as `data_prep` names it. path: of the stories.
    Raises:
        UserError: the source cannot be used, or no story fits into any of the lengths.
    """
    S, seed = segment_length(model.model), context.seed
    haystack = read_haystack(model, source, segments[-1] * S)
    points = []
    for number, of_task in stories.items():
        questions = [question for story in of_task for question in story]
        random.Random(f"babi {seed} {number}").shuffle(questions)
        tokenized = [tokenize_question(model, question) for question in questions]
        usual = most_frequent_answers(of_task)
        chance = sum(usual[question.question] == question.answer for question in questions) / len(questions)
        data = sha256_of_json([[q.facts, q.question, q.answer] for q in questions])
        for length in segments:
            fitting = [q for q in tokenized if not length or filler_tokens(model, q, length * S) >= 0][:examples]
            if len(fitting) < 2:
                logger.info(f"babi: no story of task {number} fits into {length} segments of {S} tokens; left out")
                continue
            make = partial(make_example, model, fitting, haystack, length * S, seed)
            options = {"haystack": source, "text": haystack.sha256, "stories": data, "segments": length}
            compute = partial(score_streamed, model, make, len(fitting), context.batch_tokens)
            points.append(Point(f"qa{number}", length, 0.0, chance, options, compute))
    if not points:
        raise UserError(f"--babi-segments {segments[-1]}: no story fits into segments of {S} tokens; give more of them")
    return score_points("babi", points, context, examples, S, f"{path} in {source}")


def tokenize_question(model: EvaluatedModel, question: Question) -> TokenizedQuestion:
    """Return a question in the tokens of the model, each sentence with a space before it."""

    def tokenize(text: str) -> list[int]:
        return list(model.tokenizer.encode(f" {text}", add_special_tokens=False))

    return TokenizedQuestion(
        [tokenize(fact) for fact in question.facts], tokenize(question.question), tokenize(question.answer)
    )


def filler_tokens(model: EvaluatedModel, question: TokenizedQuestion, tokens: int) -> int:
    """Return how many tokens a text of `tokens` tokens has besides the facts and the start token."""
    return tokens - len(model.start_ids) - sum(map(len, question.facts))


def make_example(
    model: EvaluatedModel,
    questions: Sequence[TokenizedQuestion],
    haystack: Haystack,
    tokens: int,
    seed: int,
    number: int,
) -> StreamedExample:
    """Return an example whose text, start token and facts included, has `tokens` tokens; 0: the story alone."""
    question = questions[number]
    if not tokens:
        story = [*model.start_ids, *(token for fact in question.facts for token in fact)]
        return StreamedExample([], story + question.question, question.answer)
    rng = random.Random(f"babi {seed} {number} {tokens}")
    pieces = hide(rng, question.facts, haystack.draw(rng, filler_tokens(model, question, tokens)))
    text = [*model.start_ids, *(token for piece in pieces for token in piece)]
    return StreamedExample(text, question.question, question.answer)
