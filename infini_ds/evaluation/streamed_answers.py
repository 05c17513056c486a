"""Questions after a text of any length, which is read once, in bounded memory, for all settings of the memory.

The text is a number of complete segments, so the question begins a segment of its own. Then nothing but the memory
passes from the text to the question: switched off, and swapped, it is so for the question alone, and the result is that
of the complete text (`test_streamed_answers_are_those_of_the_complete_text`).

Shapes: B rows, T tokens of text.
"""

import hashlib
import json
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

import torch

from infini_ds.data.batches import pad_documents
from infini_ds.distributed import collectives
from infini_ds.evaluation.accuracy import Scores
from infini_ds.evaluation.generation import read_into_cache
from infini_ds.evaluation.model_loading import EvaluatedModel, has_memory
from infini_ds.evaluation.scoring import Span, greedy_answers, memory_settings, segment_length
from infini_ds.model import InfiniCache, InfiniGPTNeoForCausalLM

SEGMENTS_AT_ONCE = 4  # of a row, at least, that are read at once


class StreamedExample(NamedTuple):
    """text: its tokens, complete segments, or none. question, answer: the tokens after it. The answer is not empty."""

    text: list[int]
    question: list[int]
    answer: list[int]


def score_streamed(
    model: EvaluatedModel, make_example: Callable[[int], StreamedExample], examples: int, batch_tokens: int
) -> Scores:
    """Return the accuracy of answers over examples of one length, split across ranks.

    Args:
        make_example: gets the number of an example.
    """
    S = segment_length(model.model)
    correct: list[dict[str, list[bool]]] = []
    hashes: list[list[str]] = []
    longest = 0
    for batch in collectives.split_across_ranks(batches_of_groups(examples, batch_tokens // (SEGMENTS_AT_ONCE * S))):
        drawn = [make_example(number) for group in batch for number in group]
        sizes = [len(group) for group in batch]
        correct.append(answers_after_texts(model, drawn, sizes))
        hashes.append([hashlib.sha256(json.dumps(example).encode()).hexdigest() for example in drawn])
        longest = max(longest, max(sum(map(len, example)) for example in drawn))
    gathered = collectives.gather_items(correct)
    of_all = [digest for of_batch in collectives.gather_items(hashes) for digest in of_batch]
    longest = max(collectives.gather_items([longest] if longest else []))
    accuracy = {name: fmean(answer for batch in gathered for answer in batch[name]) for name in gathered[0]}
    return Scores(longest, examples, accuracy, hashlib.sha256("".join(of_all).encode()).hexdigest())


def batches_of_groups(examples: int, rows: int) -> list[list[list[int]]]:
    """Return the numbers of examples in groups of 2 or 3, in batches of up to `rows` rows, or of a single group.

    In the setting "other" an example reads the memory of another one of its group, so groups do not depend on `rows`.
    """
    groups = [[number, number + 1] for number in range(0, examples - 1, 2)]
    if examples % 2:
        groups[-1].append(examples - 1)
    batches: list[list[list[int]]] = []
    for group in groups:
        if not batches or sum(map(len, batches[-1])) + len(group) > rows:
            batches.append([])
        batches[-1].append(group)
    return batches


def answers_after_texts(
    model: EvaluatedModel, examples: list[StreamedExample], groups: list[int]
) -> dict[str, list[bool]]:
    """Return for each setting of the memory and each example whether greedy decoding gives its answer.

    Args:
        examples: whose texts are all of one length.
        groups: numbers of examples that are a group each, in order. In "other", an example reads the memory of the next
            one of its group, the last one that of the first.
    """
    ends = [example.question + example.answer for example in examples]
    spans = [[(len(e.question), len(e.question) + len(e.answer))] for e in examples]
    if not has_memory(model.model):
        rows = pad_documents([e.text + end for e, end in zip(examples, ends, strict=True)])
        spans = [[(len(e.text) + a, len(e.text) + b) for a, b in span] for e, span in zip(examples, spans, strict=True)]
        return {"on": [answer for (answer,) in greedy_answers(model.model, rows, spans)]}
    texts = torch.tensor([example.text for example in examples], dtype=torch.long, device=model.model.device)
    assert texts.shape[1] % model.model.config.segment_length == 0, "the question begins a segment"
    cache = read_into_cache(model.model, texts) if texts.numel() else None
    partners: list[int] = []
    for size in groups:
        first = len(partners)
        partners += [first + (i + 1) % size for i in range(size)]
    return {
        setting: _answers(model.model, cache, ends, spans, setting, partners)
        for setting in memory_settings(model.model)
    }


def _answers(
    model: InfiniGPTNeoForCausalLM,
    cache: InfiniCache | None,
    ends: list[list[int]],
    spans: list[list[Span]],
    setting: str,
    partners: list[int],
) -> list[bool]:
    """Return for each example whether its answer is given in one setting of the memory. The cache stays as it is."""
    B = len(ends)
    others = partners if setting == "other" else []
    rows = pad_documents(ends + [ends[other] for other in others])  # of one length
    if cache is not None:
        cache = cache.copy()
        if others:
            cache.select_rows(torch.tensor([*range(B), *others]))
    correct = greedy_answers(model, rows[:B], spans, setting, rows[B:] if others else None, cache)
    return [answer for (answer,) in correct]
