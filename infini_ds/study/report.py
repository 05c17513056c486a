"""The report of a study: report.md, its figures, and report.html, which carries them inside."""

import base64
import platform
import re
import shlex
import shutil
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import markdown

from infini_ds.study import figures
from infini_ds.study.grid import Run, Study
from infini_ds.study.local import Failure
from infini_ds.study.published import FIGURES, GPT_NEO, STEPS
from infini_ds.study.results import Cell, Movement, Result, Spread, cells, chance_apart, collect, movement, spread
from infini_ds.study.steps import is_done, run_steps

FIGURES_FOLDER = "figures"
TASKS = {"blimp": "BLiMP", "glue": "(Super)GLUE"}


def write_report(study: Study, runs: list[Run], failures: list[Failure]) -> Path:
    """Of whatever is finished; returns report.html.

    Raises:
        ValueError: no run is finished.
    """
    results = collect(runs)
    if not results:
        raise ValueError(f"no run in {study.folder} is finished, so there is nothing to report: make the runs first")
    folder = study.folder / FIGURES_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = compose(study, runs, results, failures, folder)
    (study.folder / "report.md").write_text(text)
    html = study.folder / "report.html"
    html.write_text(to_html(text, study))
    return html


def compose(study: Study, runs: list[Run], results: list[Result], failures: list[Failure], folder: Path) -> str:
    found = cells(results)
    sections = [
        f"# {study.name}",
        summary(study, runs, found),
        "## What the numbers say",
        bullets(conclusions(study, found)),
        comparison(study, found, folder),
        along_finetuning(study, found, folder),
        gates(study, found, folder),
        everything(found, folder),
        provenance(study, runs, results, failures),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def summary(study: Study, runs: list[Run], found: list[Cell]) -> str:
    seeds = sorted({run.recipe.seed for run in runs})
    model = found[0].results[0]
    parameters = next((e["model"]["parameters"] for e in model.evaluations.values()), None)
    facts = [
        f"{len(runs)} runs, {sum(is_done(study, run) for run in runs)} of them finished, in {len(found)} cells; a cell is "
        f"a way to train, repeated with {plural(len(seeds), 'seed')} ({', '.join(map(str, seeds))}), of the weights and of "
        "the order of rows.",
        f"Model: preset `{runs[0].recipe.model.preset}`" + (f", {parameters:,} parameters." if parameters else "."),
        f"Text: `{study.data['source']}`; rows of {', '.join(f'{c:,}' for c in sorted({r.context_length for r in runs}))} "
        "tokens.",
        "Losses are in nats a token of the validation rows; those of different text or tokenizers cannot be compared, and "
        "those of shorter rows are higher for that alone. After ± stands the standard deviation of single runs over seeds.",
    ]
    return bullets(facts)


# What was found


def conclusions(study: Study, found: list[Cell]) -> list[str]:
    """Sentences that follow from the numbers, and what does not."""
    said = []
    for pretrained, tuned in pairs(study, found):
        one, other = pretrained.over_seeds(loss), tuned.over_seeds(loss)
        if one and other:
            tokens = "the same number of tokens" if same_tokens(pretrained, tuned) else "different numbers of tokens"
            said.append(
                f"**Pre-training or fine-tuning, segments of {pretrained.run.segment_length}** (after {tokens}): loss "
                f"{shown(one)} when pre-trained with the memory, {shown(other)} when it was added by fine-tuning: "
                f"{verdict(one, other, 'pre-training', 'fine-tuning')}"
            )
    plain = next(
        (c for c in found if c.run.is_plain and c.run.start and c.run.context_length == study.context_length), None
    )
    for cell in main_cells(study, found):
        if cell.run.start and plain and (one := cell.over_seeds(loss)) and (other := plain.over_seeds(loss)):
            said.append(
                f"**Memory or attention, segments of {cell.run.segment_length}**: loss {shown(one)} fine-tuned with the "
                f"memory, {shown(other)} fine-tuned as plain GPT-Neo that attends to the whole row of "
                f"{plain.run.context_length:,} tokens: {verdict(one, other, 'the memory', 'plain attention')}"
            )
    for cell in [cell for cell in found if not cell.run.is_plain]:
        if (gain := cell.over_seeds(gained)) and gain.low <= 0:
            said.append(
                f"**{cell.name}**: with the memory switched off the loss rises by {shown(gain, '+.4f')}, in at least one "
                "seed not at all: nothing shows that this memory is of use."
            )
    said += gate_conclusions(found)
    for task, title in TASKS.items():
        scored = [
            (cell, s) for cell in found if cell.run.start and (s := cell.over_seeds(lambda r, t=task: r.score(t)))
        ]
        if not scored:
            said.append(f"**{title}** was not evaluated (`evaluation` in the grid): nothing is said of it here.")
            continue
        low, high = (choose(scored, key=lambda pair: pair[1].mean) for choose in (min, max))
        apart = "they lie apart" if low[1].apart_from(high[1]) else "their seeds overlap"
        said.append(
            f"**{title}**: from {shown(low[1], '.3f')} ({low[0].name}) to {shown(high[1], '.3f')} ({high[0].name}) over "
            f"all fine-tuned cells; {apart}."
        )
    if any(cell.over_seeds(lambda r: r.score("blimp")) for cell in found):
        said.append(
            "A sentence of BLiMP that fits into one segment does not read the memory, so BLiMP sees how fine-tuning "
            "changes the rest of the model, and not what the memory holds."
        )
    count = max(len(cell.results) for cell in found)
    if count < 2:
        said.append("With one seed there is no spread, so no difference above can be told from chance.")
    else:
        said.append(
            f"Two cells of {count} seeds each lie apart in {chance_apart(count, count):.0%} of comparisons if there is no "
            "difference at all; and several comparisons are made. "
            + ("More seeds are needed to trust one." if count < 5 else "")
        )
    return said


def gate_conclusions(found: list[Cell]) -> list[str]:
    said = []
    for kind in ("decayed", "constant"):
        moved = [m for cell in found if cell.run.gates == kind for m in movements(cell)]
        if moved:
            half, reach_half = spread(m.half for m in moved), spread(m.reach_half for m in moved)
            said.append(
                f"**Gates, {kind} learning rate**: {half.mean:.0%} of their way lay behind them after half of the steps "
                f"(from {half.low:.0%} to {half.high:.0%} over {plural(len(moved), 'run')}), when "
                f"{reach_half.mean:.0%} of the learning rate was spent."
            )
    if len(said) == 2:
        said.append(
            "Where the first share falls with the second, gates that seem to settle are held by their learning rate; only "
            "gates that come to rest at a constant rate have converged."
        )
    return said


def verdict(one: Spread, other: Spread, name: str, other_name: str) -> str:
    if min(len(one.values), len(other.values)) < 2:
        return f"they differ by {one.mean - other.mean:+.4f}, with one seed."
    if not one.apart_from(other):
        return f"they differ by {one.mean - other.mean:+.4f}, less than their seeds do: no difference is shown."
    lower = name if one.mean < other.mean else other_name
    return f"{lower} is lower in every seed, by {abs(one.mean - other.mean):.4f} on average."


# Sections


def comparison(study: Study, found: list[Cell], folder: Path) -> str:
    rows, panels = [], {}
    for pretrained, tuned in pairs(study, found):
        if pretrained.over_seeds(loss) is None or tuned.over_seeds(loss) is None:
            continue
        S = pretrained.run.segment_length
        one, other = pretrained.over_seeds(loss), tuned.over_seeds(loss)
        difference = f"{one.mean - other.mean:+.4f}"
        apart = "yes" if one.apart_from(other) else "no"
        rows.append([S, pretrained.run.gates, *of_cell(pretrained), *of_cell(tuned), difference, apart])
        if f"segments of {S}" not in panels:
            plain = [c for c in found if c.run.is_plain and c.run.context_length == study.context_length]
            panels[f"segments of {S}"] = [*plain, pretrained, tuned]
    if not rows:
        return ""
    figures.by_tokens(panels, folder / "pretraining-or-finetuning.png")
    header = ["segment", "gates' rate", "tokens", "pre-trained", "memory off", "tokens", "fine-tuned", "memory off"]
    text = (
        "Tokens are all that the weights have seen, those of the plain GPT-Neo that fine-tuning starts from included. The "
        "learning rate of fine-tuning begins anew with its own warm-up; that of pre-training falls once over all steps."
    )
    return "\n\n".join(
        [
            "## Pre-training or fine-tuning",
            image("Validation loss over all tokens seen", "pretraining-or-finetuning.png"),
            table([*header, "difference", "apart in every seed"], rows),
            text,
        ]
    )


def of_cell(cell: Cell) -> list[str]:
    tokens = f"{cell.results[0].tokens / 1e6:,.2f}M"
    return [tokens, shown(cell.over_seeds(loss)), shown(cell.over_seeds(lambda r: r.loss_memory_off))]


def along_finetuning(study: Study, found: list[Cell], folder: Path) -> str:
    tuned = [cell for cell in main_cells(study, found) if cell.run.start]
    if not tuned:
        return ""
    plain = [c for c in found if c.run.is_plain and c.run.start and c.run.context_length == study.context_length]
    figures.along_finetuning([*plain, *tuned], folder / "figure-4.png")
    parts = [
        "## Along fine-tuning (the study's Figure 4)",
        image("BLiMP, (Super)GLUE and validation loss along fine-tuning, by segment length", "figure-4.png"),
        "The published model had a vocabulary of 10,000, width 516, 2 layers, 4 heads and rotary positions, and was trained "
        "for an epoch of TinyStories with one seed; the figures stand beside each other and are not of the same model.",
    ]
    for task, title in TASKS.items():
        parts += [f"### {title}", published_table(task, [*plain, *tuned])]
    return "\n\n".join(parts)


def published_table(task: str, tuned: list[Cell]) -> str:
    steps = sorted(
        {step for cell in tuned for result in cell.results for step in result.evaluations if _has(result, step, task)}
    )
    lengths = sorted({*FIGURES[task], *(cell.run.segment_length for cell in tuned if not cell.run.is_plain)})
    rows = []
    for S in lengths:
        published = [f"{accuracy:.3f}" for accuracy in FIGURES[task].get(S, ())] or [""] * len(STEPS)
        of_length = next((c for c in tuned if c.run.segment_length == S and not c.run.is_plain), None)
        rows.append([S, *published, *_scores(of_length, task, steps)])
    plain = next((cell for cell in tuned if cell.run.is_plain), None)
    rows.append(["plain GPT-Neo", "", "", "", f"{GPT_NEO[task]:.3f}", *_scores(plain, task, steps)])
    header = [
        "segment",
        *(f"published, step {step:,}" for step in STEPS),
        *(f"measured, step {step:,}" for step in steps),
    ]
    return table(header, rows) + ("" if steps else "\n\nNot measured here.")


def _has(result: Result, step: int, task: str) -> bool:
    return result.score(task, step) is not None


def _scores(cell: Cell | None, task: str, steps: list[int]) -> list[str]:
    if cell is None:
        return [""] * len(steps)
    return [shown(cell.over_seeds(lambda result, step=step: result.score(task, step)), ".3f") for step in steps]


def gates(study: Study, found: list[Cell], folder: Path) -> str:
    with_memory = [cell for cell in found if not cell.run.is_plain and cell.run.memory_rule == "linear"]
    with_memory = [cell for cell in with_memory if all(result.gates for result in cell.results)]
    if not with_memory:
        return ""
    pictures = []
    for arm in dict.fromkeys(cell.run.arm for cell in with_memory):
        of_arm = [cell for cell in with_memory if cell.run.arm == arm]
        for S in sorted({cell.run.segment_length for cell in of_arm}):
            of_length = [cell for cell in of_arm if cell.run.segment_length == S]
            if len({cell.run.context_length for cell in of_length}) > 1:
                name, title = f"figure-5-{arm}-s{S}.png", f"Gates by context length: {arm}, segments of {S}"
                figures.gates(of_length, "context_length", title, folder / name)
                pictures += [f"### Figure 5: {title[0].lower()}{title[1:]}", image(title, name)]
    for arm in dict.fromkeys(cell.run.arm for cell in with_memory):
        of_arm = [c for c in with_memory if c.run.arm == arm and c.run.context_length == study.context_length]
        if of_arm:
            name, title = f"figure-6-{arm}.png", f"Gates by segment length: {arm}, rows of {study.context_length:,}"
            figures.gates(of_arm, "segment_length", title, folder / name)
            pictures += [f"### Figure 6: {title[0].lower()}{title[1:]}", image(title, name)]
    header = ["cell", "moved", "way", "could have moved", "way behind by half", "learning rate spent by half"]
    moved = [(cell, movements(cell)) for cell in found]
    rows = [[cell.name, *_movement_row(of_cell)] for cell, of_cell in moved if of_cell]
    text = (
        "Of the gates beta (a gate is sigmoid(beta)), means over heads and seeds. *Moved* is from start to end, *way* is all "
        "movement up and down added up between recorded steps, *could have moved* is the sum of the learning rates, the most "
        "that Adam moves a value."
    )
    return "\n\n".join(
        ["## Gates (the study's Figures 5 and 6)", *pictures, "### How far they moved", table(header, rows), text]
    )


def _movement_row(of_cell: list[Movement]) -> list[str]:
    figures_of = [[getattr(m, name) for m in of_cell] for name in ("moved", "path", "reach", "half", "reach_half")]
    formats = (".2f", ".2f", ".2f", ".0%", ".0%")
    return [
        shown(spread(values), form, name == 3)
        for name, (values, form) in enumerate(zip(figures_of, formats, strict=True))
    ]


def everything(found: list[Cell], folder: Path) -> str:
    figures.all_cells(found, folder / "all-cells.png")
    parts = ["## Every cell", image("Last validation loss of every cell and seed", "all-cells.png")]
    if figures.gain_by_segment([cell for cell in found if not cell.run.is_plain], folder / "gain.png"):
        parts.append(image("Loss that the memory saves, by position in the row", "gain.png"))
    header = ["cell", "seeds", "tokens", "validation loss", "memory off", "saved by the memory", *TASKS.values()]
    rows = []
    for cell in found:
        scores = [shown(cell.over_seeds(lambda result, t=task: result.score(t)), ".3f") for task in TASKS]
        saved = "" if cell.run.is_plain else shown(cell.over_seeds(gained), "+.4f")
        rows.append([cell.name, len(cell.results), *of_cell(cell), saved, *scores])
    return "\n\n".join([*parts, table(header, rows)])


def provenance(study: Study, runs: list[Run], results: list[Result], failures: list[Failure]) -> str:
    of_run = {result.run.name: result for result in results}
    rows = []
    for run in runs:
        result = of_run.get(run.name)
        hashes = [result.model_sha256[:16], result.data_sha256] if result else ["", ""]
        loss_of = f"{result.loss:.4f}" if result and result.loss is not None else ""
        rows.append(
            [run.number, run.name, run.recipe.seed, run.recipe.data.seed, f"{run.recipe.steps:,}", loss_of, *hashes]
        )
    header = ["", "run", "seed", "seed of rows", "steps", "validation loss", "model sha256", "training shards"]
    commands = [step.command for run in runs for step in run_steps(study, run) if step.what != "export"]
    parts = ["## Runs", table(header, rows)]
    missing = [run.name for run in runs if not is_done(study, run)]
    if missing:
        reasons = {failure.run: str(failure) for failure in failures}
        parts += ["### Not finished", bullets(reasons.get(name, name) for name in missing)]
    sources = _evaluated_data(results)
    if sources:
        parts += ["### Data of the evaluations", table(["task", "path", "sha256"], sources)]
    made = f"Made {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC with " + ", ".join(
        [
            f"Python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed")),
        ]
    )
    shown_commands = "\n".join(_readable(command) for command in commands)
    return "\n\n".join([*parts, "### Commands", f"```sh\n{shown_commands}\n```", made + "."])


def _evaluated_data(results: list[Result]) -> list[list[str]]:
    rows = []
    for result in results:
        for evaluation in result.evaluations.values():
            for task, found in evaluation["tasks"].items():
                data = found.get("data", {})
                row = [task, str(data.get("path", "")), str(data.get("sha256", ""))[:16]]
                if row not in rows:
                    rows.append(row)
    return sorted(rows)


def _readable(command: tuple[str, ...]) -> str:
    return shlex.join(["python", *command[1:]])


# Cells


def main_cells(study: Study, found: list[Cell]) -> list[Cell]:
    """Of the study's own setting: its context length, the linear rule, the learning rate of gates decayed if there is."""
    of_setting = [
        cell
        for cell in found
        if not cell.run.is_plain
        and cell.run.context_length == study.context_length
        and cell.run.memory_rule == "linear"
    ]
    decayed = [cell for cell in of_setting if cell.run.gates == "decayed"]
    return sorted(decayed or of_setting, key=lambda cell: cell.run.segment_length)


def pairs(study: Study, found: list[Cell]) -> list[tuple[Cell, Cell]]:
    """(pre-trained, fine-tuned) cells of one segment length, context length, rule and schedule."""
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
    return None if result.loss is None else result.loss_memory_off - result.loss


# Words


def shown(found: Spread | None, form: str = ".4f", with_spread: bool = True) -> str:
    """`3.1415 ± 0.0021`"""
    if found is None:
        return ""
    deviation = f" ± {found.deviation:{form.lstrip('+')}}" if found.deviation is not None and with_spread else ""
    return f"{found.mean:{form}}{deviation}"


def plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(header: list[str], rows: list[list]) -> str:
    """Numbers to the right."""
    marks = [
        "---" if not isinstance(row, int) and name in ("cell", "run", "task", "path", "") else "---:"
        for name, row in zip(header, rows[0], strict=True)
    ]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, marks, *rows])


def image(words: str, name: str) -> str:
    return f"![{words}]({FIGURES_FOLDER}/{name})"


# HTML

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2126; background: #fff; max-width: 1080px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 2rem; margin: 0 0 1rem; } h2 { margin: 3rem 0 1rem; padding-bottom: .3rem; border-bottom: 1px solid #dde1e6; }
h3 { margin: 2rem 0 .6rem; } li { margin: .35rem 0; }
img { display: block; max-width: 100%; margin: 1rem auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #e6e9ed; white-space: nowrap; } th { border-bottom: 2px solid #c5cbd3; vertical-align: bottom; white-space: normal; }
tbody tr:hover { background: #f5f7fa; } code, pre { font: .82rem/1.5 ui-monospace, monospace; background: #f5f7fa; border-radius: 4px; }
code { padding: .1rem .3rem; } pre { padding: .8rem 1rem; overflow: auto; max-height: 24rem; } pre code { padding: 0; background: none; }
"""


def to_html(text: str, study: Study) -> str:
    """One file that needs no other: pictures are inside."""
    body = markdown.markdown(text, extensions=["tables", "fenced_code", "sane_lists"])

    def inside(match: re.Match) -> str:
        picture = base64.b64encode((study.folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{picture}"'

    body = re.sub(r'src="([^":]+\.png)"', inside, body)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{study.name}</title>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n'
