"""What follows from the numbers of a study, in sentences, and what does not."""

from infini_ds.study.grid import Run, Study
from infini_ds.study.results import Cell, Movement, Result, Spread, chance_apart, movement, spread

TASKS = {"blimp": "BLiMP", "glue": "(Super)GLUE"}
ENOUGH_SEEDS = 5  # in a cell, from which on it is rare that two cells lie apart by chance (2 of 252)


def findings(study: Study, found: list[Cell]) -> list[str]:
    """
    Args:
        found: all cells with a finished run.
    """
    return [
        *_of_pretraining(study, found),
        *_of_memory(study, found),
        *_of_gates(found),
        *(_of_task(task, found) for task in TASKS),
        _of_seeds(found),
    ]


def _of_pretraining(study: Study, found: list[Cell]) -> list[str]:
    said = []
    for pretrained, tuned in pairs(study, found):
        one, other = pretrained.over_seeds(loss), tuned.over_seeds(loss)
        if one and other:
            tokens = "as many tokens" if same_tokens(pretrained, tuned) else "another number of tokens"
            said.append(
                f"**Pre-training or fine-tuning, segments of {pretrained.run.segment_length}**: loss {shown(one)} when "
                f"pre-trained with the memory, {shown(other)} when it was added by fine-tuning, after {tokens}: "
                f"{verdict(one, other, 'pre-training', 'fine-tuning')}"
            )
    return said


def _of_memory(study: Study, found: list[Cell]) -> list[str]:
    said = []
    plain = plain_tuned(study, found)
    for cell in main_cells(study, found):
        if plain and cell.run.start and (one := cell.over_seeds(loss)) and (other := plain.over_seeds(loss)):
            said.append(
                f"**Memory or attention, segments of {cell.run.segment_length}**: loss {shown(one)} fine-tuned with "
                f"the memory, {shown(other)} fine-tuned as plain GPT-Neo that attends to whole rows of "
                f"{plain.run.context_length:,} tokens: {verdict(one, other, 'the memory', 'plain attention')}"
            )
    for cell in found:
        if not cell.run.is_plain and (gain := cell.over_seeds(gained)) and gain.low <= 0:
            said.append(
                f"**{cell.name}**: with the memory switched off the loss rises by {shown(gain, '+.4f')}, in at least "
                "one seed not at all: nothing shows that this memory is of use."
            )
    return said


def _of_gates(found: list[Cell]) -> list[str]:
    said = []
    for kind in ("decayed", "constant"):
        moved = [one for cell in found if cell.run.gates == kind for one in movements(cell)]
        if moved:
            half, spent = spread(one.half for one in moved), spread(one.reach_half for one in moved)
            said.append(
                f"**Gates, {kind} learning rate**: {half.mean:.0%} of their way lay behind them after half of the "
                f"steps ({half.low:.0%} to {half.high:.0%} over {plural(len(moved), 'run')}), when {spent.mean:.0%} of "
                "the learning rate was spent."
            )
    if len(said) == 2:
        said.append(
            "Where the first share goes with the second, gates that seem to settle are held by their learning rate; "
            "only those that come to rest at a constant rate have converged."
        )
    return said


def _of_task(task: str, found: list[Cell]) -> str:
    title = TASKS[task]
    tuned = [(cell.over_seeds(lambda result: result.score(task)), cell.name) for cell in found if cell.run.start]
    scored = [(score, name) for score, name in tuned if score]
    if not scored:
        return f"**{title}** was not evaluated (`evaluation.{task}` of the grid), so nothing is said of it."
    (low, worst), (high, best) = (choose(scored, key=lambda pair: pair[0].mean) for choose in (min, max))
    apart = "they lie apart in every seed" if low.apart_from(high) else "their seeds overlap"
    said = f"**{title}**, fine-tuned: {shown(low, '.3f')} ({worst})"
    said += f" to {shown(high, '.3f')} ({best}); {apart}." if len(scored) > 1 else "."
    if task == "blimp":
        pairs_of = max(result.blimp_pairs for cell in found for result in cell.results)
        said += (
            f" {pairs_of:,} pairs alone leave a standard error of {(0.25 / pairs_of) ** 0.5:.3f}. A sentence that fits "
            "into one segment does not read the memory: BLiMP sees how fine-tuning changes the rest of the model."
        )
    return said


def _of_seeds(found: list[Cell]) -> str:
    count = max(len(cell.results) for cell in found)
    if count < 2:
        return "With one seed there is no spread, so no difference can be told from chance."
    more = " More seeds are needed to trust one." if count < ENOUGH_SEEDS else ""
    return (
        f"Two cells of {count} seeds lie apart in every seed by chance alone in {chance_apart(count, count):.0%} of "
        f"comparisons, and several are made here.{more}"
    )


def verdict(one: Spread, other: Spread, name: str, other_name: str) -> str:
    """Which of two losses is lower, in so far as the seeds can tell."""
    if min(len(one.values), len(other.values)) < 2:
        return f"they differ by {one.mean - other.mean:+.4f}, with one seed."
    if not one.apart_from(other):
        return f"they differ by {one.mean - other.mean:+.4f}, and their seeds overlap: no difference is shown."
    lower = name if one.mean < other.mean else other_name
    return f"{lower} is lower in every seed, by {abs(one.mean - other.mean):.4f} on average."


# Which cells are compared


def main_cells(study: Study, found: list[Cell]) -> list[Cell]:
    """Those of the study's own setting: its context length, linear rule, and the gates' rate decayed, if there is."""
    cells = [cell for cell in found if not cell.run.is_plain and cell.run.memory_rule == "linear"]
    cells = [cell for cell in cells if cell.run.context_length == study.context_length]
    decayed = [cell for cell in cells if cell.run.gates == "decayed"]
    return sorted(decayed or cells, key=lambda cell: cell.run.segment_length)


def plain_tuned(study: Study, found: list[Cell]) -> Cell | None:
    """The plain GPT-Neo that was trained on as long as others were fine-tuned with a memory."""
    plain = (cell for cell in found if cell.run.is_plain and cell.run.start)
    return next((cell for cell in plain if cell.run.context_length == study.context_length), None)


def pairs(study: Study, found: list[Cell]) -> list[tuple[Cell, Cell]]:
    """(pre-trained, fine-tuned) cells of the same segments, rows, rule and schedule of gates."""
    memory = [cell for cell in found if not cell.run.is_plain]
    return [
        (one, other)
        for one in memory
        for other in memory
        if not one.run.start and other.run.start and _setting(one.run) == _setting(other.run)
    ]


def _setting(run: Run) -> tuple:
    return run.segment_length, run.context_length, run.memory_rule, run.gates


def same_tokens(one: Cell, other: Cell) -> bool:
    tokens = {result.tokens for cell in (one, other) for result in cell.results}
    return max(tokens) <= 1.01 * min(tokens)


def movements(cell: Cell) -> list[Movement]:
    return [found for result in cell.results if (found := movement(result))]


def loss(result: Result) -> float | None:
    return result.loss


def gained(result: Result) -> float | None:
    """How much lower the loss is with the memory than without it."""
    return None if result.loss is None else result.loss_memory_off - result.loss


def shown(found: Spread | None, form: str = ".4f") -> str:
    """`3.1415 ± 0.0021`, mean and standard deviation over seeds."""
    if found is None:
        return ""
    deviation = "" if found.deviation is None else f" ± {found.deviation:{form.lstrip('+')}}"
    return f"{found.mean:{form}}{deviation}"


def plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
