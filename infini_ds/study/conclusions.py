"""Sentences that follow from a study's numbers, and the choice of cells that are compared.

Two cells are called different only if the ranges of their seeds are disjoint.
"""

from infini_ds.study.results import (
    Cell,
    RunInfo,
    RunResult,
    Spread,
    chance_of_disjoint_ranges,
    gate_movements,
    spread,
)

TASKS = {"blimp": "BLiMP", "glue": "(Super)GLUE"}
HEADLINES = {"blimp": "accuracy", "glue": "mean"}  # the metric that stands for the task
ENOUGH_SEEDS = 5  # per cell: two equal cells then have disjoint ranges by chance in 2 of 252 comparisons


def conclude(cells: list[Cell], context_length: int) -> list[str]:
    """Return the conclusions as Markdown sentences.

    Args:
        cells: all cells that have a finished run.
        context_length: the study's own, whose cells are compared with each other.
    """
    return [
        *_compare_pretraining(cells),
        *_compare_with_plain(cells, context_length),
        *_find_useless_memories(cells),
        *_describe_gates(cells),
        *(_describe_task(task, cells) for task in TASKS),
        _describe_seeds(cells),
    ]


def _compare_pretraining(cells: list[Cell]) -> list[str]:
    sentences = []
    for pretrained, finetuned in pretrained_and_finetuned(cells):
        one, other = pretrained.over_seeds(loss), finetuned.over_seeds(loss)
        if one and other:
            tokens = "equally many tokens" if same_tokens(pretrained, finetuned) else "different numbers of tokens"
            sentences.append(
                f"**Pre-training or fine-tuning, {describe(finetuned.run)}**: loss "
                f"{format_spread(one)} when pre-trained with the memory, {format_spread(other)} when the memory was "
                f"added by fine-tuning, after {tokens}: {verdict(one, other, 'pre-training', 'fine-tuning')}"
            )
    return sentences


def _compare_with_plain(cells: list[Cell], context_length: int) -> list[str]:
    plain = finetuned_plain(cells, context_length)
    other = plain.over_seeds(loss) if plain else None
    if not plain or not other:
        return []
    return [
        f"**Memory or attention, {describe(cell.run)}**: loss {format_spread(one)} fine-tuned with "
        f"the memory, {format_spread(other)} fine-tuned as a plain GPT-Neo that attends to complete rows of "
        f"{plain.run.context_length:,} tokens: {verdict(one, other, 'the memory', 'plain attention')}"
        for cell in main_cells(cells, context_length)
        if cell.run.start_from and (one := cell.over_seeds(loss))
    ]


def _find_useless_memories(cells: list[Cell]) -> list[str]:
    return [
        f"**{cell.name}**: with the memory off the loss changes by {format_spread(gain, '+.4f')}, and in at least one "
        "seed it does not rise: nothing shows that this memory is of use."
        for cell in cells
        if cell.run.uses_memory and (gain := cell.over_seeds(lambda result: result.gain)) and gain.low <= 0
        if any(gain.values)  # 0 in all seeds: gates that stay closed, on purpose
    ]


def _describe_gates(cells: list[Cell]) -> list[str]:
    sentences = []
    for schedule in ("decayed", "constant"):
        movements = [one for cell in cells if cell.run.gate_schedule == schedule for one in gate_movements(cell)]
        path = spread(one.first_half_of_path for one in movements)
        rate = spread(one.first_half_of_learning_rate for one in movements)
        if path and rate:
            sentences.append(
                f"**Gates, {schedule} learning rate**: the gates covered {path.mean:.0%} of their path in the first "
                f"half of the steps ({path.low:.0%} to {path.high:.0%} over {plural(len(movements), 'run')}), which "
                f"has {rate.mean:.0%} of the sum of the learning rates."
            )
    if len(sentences) == 2:
        sentences.append(
            "Where the first percentage follows the second, gates that seem to converge are only held by their "
            "learning rate; gates have converged if they come to rest at a constant learning rate."
        )
    return sentences


def _describe_task(task: str, cells: list[Cell]) -> str:
    title = TASKS[task]
    finetuned = [(cell.last(task, HEADLINES[task]), cell.name) for cell in cells if cell.run.start_from]
    scored = [(score, name) for score, name in finetuned if score]
    if not scored:
        return f"**{title}** was not evaluated (`evaluation.{task}` of the study), so there is no conclusion about it."
    low, worst = min(scored, key=lambda pair: pair[0].mean)
    high, best = max(scored, key=lambda pair: pair[0].mean)
    sentence = f"**{title}**, fine-tuned: {format_spread(low, '.3f')} ({worst})"
    if len(scored) > 1:
        ranges = "their ranges are disjoint" if low.ranges_disjoint(high) else "their ranges overlap"
        sentence += f" to {format_spread(high, '.3f')} ({best}); {ranges}"
    sentence += "."
    if task == "blimp":
        pairs = max(int(result.last("blimp", "pairs") or 0) for cell in cells for result in cell.results)
        sentence += (
            f" The standard error from {pairs:,} sentence pairs alone is {(0.25 / pairs) ** 0.5:.3f}. A sentence "
            "that fits into one segment does not read the memory: BLiMP shows how fine-tuning changes the rest of the "
            "model."
        )
    return sentence


def _describe_seeds(cells: list[Cell]) -> str:
    count = max(len(cell.results) for cell in cells)
    if count < 2:
        return "With one seed there is no spread, so no difference can be told from chance."
    more = " More seeds are needed to trust one." if count < ENOUGH_SEEDS else ""
    return (
        f"Two equal cells of {count} seeds have disjoint ranges by chance alone in "
        f"{chance_of_disjoint_ranges(count, count):.0%} of comparisons, and this report makes several.{more}"
    )


def verdict(one: Spread, other: Spread, name: str, other_name: str) -> str:
    """Say which of two losses is lower, as far as the seeds can show."""
    difference = f"they differ by {one.mean - other.mean:+.4f}"
    if min(len(one.values), len(other.values)) < 2:
        return f"{difference}, with one seed."
    if not one.ranges_disjoint(other):
        return f"{difference}, and their ranges over seeds overlap: no difference is shown."
    lower = name if one.mean < other.mean else other_name
    return f"{lower} is lower in every seed, by {abs(one.mean - other.mean):.4f} on average."


# Which cells are compared


def main_cells(cells: list[Cell], context_length: int) -> list[Cell]:
    """Return the cells with the study's own context length, the linear rule and, if there are any, decayed gates."""
    chosen = [cell for cell in cells if cell.run.uses_memory and cell.run.memory_rule == "linear"]
    chosen = [cell for cell in chosen if cell.run.context_length == context_length]
    decayed = [cell for cell in chosen if cell.run.gate_schedule == "decayed"]
    return sorted(decayed or chosen, key=lambda cell: cell.run.segment_length)


def finetuned_plain(cells: list[Cell], context_length: int) -> Cell | None:
    """Return the plain GPT-Neo that was trained for as long as others were fine-tuned with a memory."""
    plain = (cell for cell in cells if not cell.run.uses_memory and cell.run.start_from)
    return next((cell for cell in plain if cell.run.context_length == context_length), None)


def pretrained_and_finetuned(cells: list[Cell]) -> list[tuple[Cell, Cell]]:
    """Return pairs of cells that differ only by when the memory was added."""
    memory = [cell for cell in cells if cell.run.uses_memory]
    return [
        (one, other)
        for one in memory
        for other in memory
        if not one.run.start_from and other.run.start_from and _shape(one.run) == _shape(other.run)
    ]


def _shape(run: RunInfo) -> tuple[int, int, str, str]:
    return run.segment_length, run.context_length, run.memory_rule, run.gate_schedule


def describe(run: RunInfo) -> str:
    """Name a configuration in words, without its arm."""
    parts = [f"segments of {run.segment_length}", f"rows of {run.context_length:,}", f"{run.memory_rule} rule"]
    parts += [f"{run.gate_schedule} learning rate of the gates", *([run.axes_text] if run.axes else [])]
    return ", ".join(parts)


def same_tokens(one: Cell, other: Cell) -> bool:
    tokens = {result.tokens for cell in (one, other) for result in cell.results}
    return max(tokens) <= 1.01 * min(tokens)


def loss(result: RunResult) -> float | None:
    return result.loss


def format_spread(found: Spread | None, form: str = ".4f") -> str:
    """`3.1415 ± 0.0021`: mean and standard deviation over seeds."""
    if found is None:
        return ""
    deviation = "" if found.deviation is None else f" ± {found.deviation:{form.lstrip('+')}}"
    return f"{found.mean:{form}}{deviation}"


def plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
