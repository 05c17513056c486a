"""Recall during training: accuracy on generated examples, with the memory on and off.

The examples are those of `data_prep.synthetic`, as in the evaluation task `recall`. An answer is correct if greedy
decoding gives all of its tokens.

Shapes: B rows, T tokens in a row.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_prep.synthetic.examples import Example
from data_prep.synthetic.specs import parse_task
from data_prep.synthetic.tasks import evaluation_seed
from infini_ds.data.batches import ModelInputs, batches_by_length, pad_documents
from infini_ds.distributed import collectives
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.training.validation import evaluating

BATCH_TOKENS = 4096  # that a rank computes at once, padding included, or a single example
SEED = evaluation_seed(0)
Span = tuple[int, int]  # tokens [begin, end) of a row


@dataclass(frozen=True)
class RecallExamples:
    """Examples of a recall task as rows of tokens.

    answers: where the answers of each row are.
    """

    task: str
    rows: list[list[int]]
    answers: list[list[Span]]


@dataclass(frozen=True)
class RecallAccuracy:
    """The share of a task's answers that are correct, with the memory on and off."""

    task: str
    on: float
    off: float


def draw_examples(
    tasks: Iterable[str], examples: int, tokenizer: PreTrainedTokenizerBase, start_id: int
) -> dict[str, RecallExamples]:
    """Return examples of each task, by its name, the same at each call.

    Args:
        tasks: as `data_prep.synthetic.specs.parse_task` reads them.
        start_id: the token that each example begins with.
    Raises:
        UserError: the tokenizer splits every word of the filler.
    """
    tokenize = cache(lambda text: tokenizer.encode(text, add_special_tokens=False))
    found = {}
    for name in tasks:
        drawn = [parse_task(name).example(SEED, index, tokenize) for index in range(examples)]
        found[name] = RecallExamples(name, *rows_with_answers(drawn, [start_id]))
    return found


def rows_with_answers(
    examples: Sequence[Example], start_ids: Sequence[int]
) -> tuple[list[list[int]], list[list[Span]]]:
    """Return each example as a row of tokens, and where its answers are in the row.

    Args:
        start_ids: the tokens that each row begins with.
    """
    offset = len(start_ids)
    rows = [[*start_ids, *example.tokens] for example in examples]
    return rows, [[(offset + a.begin, offset + a.end) for a in example.answers] for example in examples]


@torch.no_grad()
def measure_recall(
    model: InfiniGPTNeoForCausalLM, examples: RecallExamples, abort: Callable[[], bool] = lambda: False
) -> RecallAccuracy | None:
    """Return the accuracy on the examples, which are split across the ranks, on every rank.

    The batches, and so the result, do not depend on the number of ranks.

    Args:
        abort: called before each batch, equally often on every rank; once it returns True, the result is None.
    """
    batches = batches_by_length([len(row) for row in examples.rows], BATCH_TOKENS)
    mine = collectives.split_across_ranks(batches)
    correct = torch.zeros(2, dtype=torch.float64, device=model.device)  # memory on, memory off
    with evaluating(model):
        for number in range(math.ceil(len(batches) / collectives.world_size())):
            if abort():
                return None
            if number == len(mine):  # another rank has one more
                continue
            batch = pad_documents([examples.rows[i] for i in mine[number]])
            answers = [examples.answers[i] for i in mine[number]]
            (inputs,) = batch.micro_batches(len(batch), model.device)
            for setting, use_memory in enumerate((True, False)):

                def predict(rows: Tensor, positions: Tensor, inputs=inputs, use_memory=use_memory) -> Tensor:
                    return likeliest_tokens(model, inputs, rows, positions, use_memory=use_memory)

                graded = grade_answers(batch.input_ids, answers, predict)
                correct[setting] += sum(map(sum, graded))
    if dist.is_initialized():
        dist.all_reduce(correct)
    on, off = (correct / sum(map(len, examples.answers))).tolist()
    return RecallAccuracy(examples.task, on, off)


def grade_answers(
    ids: Tensor, answers: Sequence[Sequence[Span]], predict: Callable[[Tensor, Tensor], Tensor]
) -> list[list[bool]]:
    """Return for each answer whether each of its tokens is the likeliest one after the true tokens before it.

    Args:
        ids: (B, T) on the CPU.
        answers: where the answers of each row are.
        predict: (rows, positions) -> the likeliest token at each of these places, on the CPU.
    """
    places = [(row, at) for row, spans in enumerate(answers) for begin, end in spans for at in range(begin, end)]
    rows, positions = torch.tensor(places).unbind(1)
    matches = (predict(rows, positions) == ids[rows, positions]).tolist()
    correct = {place for place, match in zip(places, matches, strict=True) if match}
    return [[all((row, at) in correct for at in range(*span)) for span in spans] for row, spans in enumerate(answers)]


def likeliest_tokens(
    model: InfiniGPTNeoForCausalLM, inputs: ModelInputs, rows: Tensor, positions: Tensor, **options: Any
) -> Tensor:
    """Return the likeliest token at each of some places, after all tokens before it, on the CPU.

    Args:
        inputs: of the model; `options` are further arguments of it.
    """
    without_labels = {name: values for name, values in inputs.items() if name != "labels"}
    hidden = model.transformer(**without_labels, **options).last_hidden_state
    return model.lm_head(hidden[rows, positions - 1]).argmax(-1).cpu()
