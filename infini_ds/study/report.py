"""The report of a study: report.md, its figures, and report.html, which carries them inside."""

import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

from infini_ds.study import figures
from infini_ds.study.commands import is_done, readable, run_steps
from infini_ds.study.conclusions import (
    TASKS,
    findings,
    gained,
    loss,
    main_cells,
    movements,
    pairs,
    plain_tuned,
    plural,
    shown,
)
from infini_ds.study.grid import Run, Study
from infini_ds.study.html import bullets, table, to_html
from infini_ds.study.local_runner import Failure
from infini_ds.study.reference_results import FIGURES, GPT_NEO, STEPS
from infini_ds.study.results import Cell, Result, cells, collect, spread
from infini_ds.utils.errors import UserError

PICTURES = "figures"
HASH = 16  # digits of a sha256 that are shown


def write_report(study: Study, runs: list[Run], failures: list[Failure]) -> Path:
    """Of whatever is finished; returns report.html.

    Raises:
        UserError: no run is finished.
    """
    results = collect(runs)
    if not results:
        raise UserError(f"no run in {study.folder} is finished, so there is nothing to report: make the runs first")
    pictures = study.folder / PICTURES
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    found = cells(results)
    sections = [
        f"# {study.name}",
        summary(study, runs, results),
        "## What the numbers say",
        bullets(findings(study, found)),
        *comparison(study, found, pictures),
        *along_finetuning(study, found, pictures),
        *gates(study, found, pictures),
        *everything(found, pictures),
        *provenance(study, runs, results, failures),
    ]
    text = "\n\n".join(sections) + "\n"
    (study.folder / "report.md").write_text(text)
    page = study.folder / "report.html"
    page.write_text(to_html(text, study.name, study.folder))
    return page


def summary(study: Study, runs: list[Run], results: list[Result]) -> str:
    seeds = sorted({run.recipe.seed for run in runs})
    sizes = {e["model"]["parameters"] for result in results for e in result.evaluations.values()}
    size = f", {max(sizes):,} parameters" if sizes else ""
    rows = ", ".join(f"{length:,}" for length in sorted({run.context_length for run in runs}))
    done = sum(is_done(study, run) for run in runs)
    return bullets(
        [
            f"{plural(len(runs), 'run')}, {done} of them finished. A cell is a way to train, repeated with "
            f"{plural(len(seeds), 'seed')} ({', '.join(map(str, seeds))}) of the weights and of the order of rows.",
            f"Model: preset `{runs[0].recipe.model.preset}`{size}. Text: `{study.data['source']}`, "
            f"rows of {rows} tokens, documents of {results[0].document_tokens:,.0f} on average. A memory ends with its "
            "document, so segments that are not much shorter than documents leave it little to do.",
            "Losses are in nats a token, on validation rows. Those of other text or another tokenizer cannot be "
            "compared, and shorter rows have higher ones for that alone. Behind ± stands the standard deviation of "
            "single runs over seeds; bands in figures reach from the lowest seed to the highest.",
        ]
    )


def comparison(study: Study, found: list[Cell], pictures: Path) -> list[str]:
    rows, panels = [], {}
    plain = [cell for cell in found if cell.run.is_plain and cell.run.context_length == study.context_length]
    for pretrained, tuned in pairs(study, found):
        one, other = pretrained.over_seeds(loss), tuned.over_seeds(loss)
        if one and other:
            apart = "yes" if one.apart_from(other) else "no"
            setting = [pretrained.run.segment_length, pretrained.run.gates]
            difference = f"{one.mean - other.mean:+.4f}"
            rows.append([*setting, *losses_of(pretrained), *losses_of(tuned), difference, apart])
            panels.setdefault(f"segments of {pretrained.run.segment_length}", [*plain, pretrained, tuned])
    if not rows:
        return []
    figures.by_tokens(panels, pictures / "pretraining-or-finetuning.png")
    half = ["tokens", "{}", "memory off"]
    header = [word.format(way) for way in ("pre-trained", "fine-tuned") for word in half]
    return [
        "## Pre-training or fine-tuning",
        image("Validation loss over all tokens seen", "pretraining-or-finetuning.png"),
        table(["segment", "gates' rate", *header, "difference", "apart in every seed"], rows, words=("gates' rate",)),
        "Tokens are all that the weights have seen, those of the plain GPT-Neo that fine-tuning starts from included. "
        "The learning rate of fine-tuning begins anew, with its own warm-up; that of pre-training falls once over all "
        "steps.",
    ]


def along_finetuning(study: Study, found: list[Cell], pictures: Path) -> list[str]:
    tuned = [cell for cell in main_cells(study, found) if cell.run.start]
    if not tuned:
        return []
    plain = plain_tuned(study, found)
    figures.along_finetuning([*([plain] if plain else []), *tuned], pictures / "figure-4.png")
    parts = [
        "## Along fine-tuning (the study's Figure 4)",
        image("BLiMP, (Super)GLUE and validation loss along fine-tuning, by segment length", "figure-4.png"),
        "The published model had a vocabulary of 10,000, width 516, 2 layers, 4 heads and rotary positions, and was "
        "trained for an epoch of TinyStories with one seed. The figures stand beside each other; they are not of the "
        "same model.",
    ]
    for task, title in TASKS.items():
        parts += [f"### {title}", published_table(task, tuned, plain)]
    return parts


def published_table(task: str, tuned: list[Cell], plain: Cell | None) -> str:
    every = [*tuned, *([plain] if plain else [])]
    steps = sorted({step for cell in every for result in cell.results for step in result.steps_with(task)})
    rows = []
    for S in sorted({*FIGURES[task], *(cell.run.segment_length for cell in tuned)}):
        published = [f"{accuracy:.3f}" for accuracy in FIGURES[task].get(S, ())] or [""] * len(STEPS)
        rows.append([S, *published, *scores(next((c for c in tuned if c.run.segment_length == S), None), task, steps)])
    rows.append(["plain", *[""] * (len(STEPS) - 1), f"{GPT_NEO[task]:.3f}", *scores(plain, task, steps)])
    columns = [*(f"published, step {step:,}" for step in STEPS), *(f"here, step {step:,}" for step in steps)]
    below = f"Here the mean over {', '.join(glue_tasks(every))}." if task == "glue" and steps else ""
    return "\n\n".join([table(["segment", *columns], rows), below if steps else "Not measured here."])


def glue_tasks(found: list[Cell]) -> list[str]:
    measured = (
        e["tasks"].get("glue") for cell in found for result in cell.results for e in result.evaluations.values()
    )
    return sorted({name for glue in measured if glue for name in glue["tasks"]})


def scores(cell: Cell | None, task: str, steps: list[int]) -> list[str]:
    if cell is None:
        return [""] * len(steps)
    return [shown(cell.over_seeds(lambda result, step=step: result.score(task, step)), ".3f") for step in steps]


def gates(study: Study, found: list[Cell], pictures: Path) -> list[str]:
    linear = [cell for cell in found if not cell.run.is_plain and cell.run.memory_rule == "linear"]
    linear = [cell for cell in linear if all(result.gates for result in cell.results)]
    parts = []
    for arm in dict.fromkeys(cell.run.arm for cell in linear):
        of_arm = [cell for cell in linear if cell.run.arm == arm]
        for S in sorted({cell.run.segment_length for cell in of_arm}):
            of_length = [cell for cell in of_arm if cell.run.segment_length == S]
            if len({cell.run.context_length for cell in of_length}) > 1:
                title, name = f"Gates by context length: {arm}, segments of {S}", f"figure-5-{arm}-s{S}.png"
                parts.append(image(title, figures.gates(of_length, "context_length", title, pictures / name).name))
    for arm in dict.fromkeys(cell.run.arm for cell in linear):
        of_arm = [c for c in linear if c.run.arm == arm and c.run.context_length == study.context_length]
        if of_arm:
            title, name = f"Gates by segment length: {arm}, rows of {study.context_length:,}", f"figure-6-{arm}.png"
            parts.append(image(title, figures.gates(of_arm, "segment_length", title, pictures / name).name))
    header = ["cell", "moved", "way", "could have moved", "way gone by half", "learning rate spent by half"]
    rows = [movement_row(cell) for cell in found if movements(cell)]
    if not rows:
        return []
    return [
        "## Gates (the study's Figures 5 and 6)",
        *parts,
        "### How far they moved",
        table(header, rows, words=("cell",)),
        "Of beta, whose sigmoid is the gate; means over heads and seeds. *Moved* is from start to end; *way* is all "
        "movement up and down between recorded steps, added up; *could have moved* is the sum of the learning rates, "
        "the most that Adam moves a value.",
    ]


def movement_row(cell: Cell) -> list[str]:
    moved = movements(cell)
    columns = (("moved", ".2f"), ("path", ".2f"), ("reach", ".2f"), ("half", ".0%"), ("reach_half", ".0%"))
    means = {name: spread(getattr(one, name) for one in moved).mean for name, _ in columns}
    return [cell.name, *(f"{means[name]:{form}}" for name, form in columns)]


def everything(found: list[Cell], pictures: Path) -> list[str]:
    figures.all_cells(found, pictures / "all-cells.png")
    parts = ["## Every cell", image("Last validation loss of every cell and seed", "all-cells.png")]
    if figures.gain_by_segment([cell for cell in found if not cell.run.is_plain], pictures / "gain.png"):
        parts.append(image("Loss that the memory saves, by position in the row", "gain.png"))
    header = ["cell", "seeds", "tokens", "validation loss", "memory off", "saved by the memory", *TASKS.values()]
    rows = []
    for cell in found:
        of_tasks = [shown(cell.over_seeds(lambda result, t=task: result.score(t)), ".3f") for task in TASKS]
        saved = "" if cell.run.is_plain else shown(cell.over_seeds(gained), "+.4f")
        rows.append([cell.name, len(cell.results), *losses_of(cell), saved, *of_tasks])
    return [*parts, table(header, rows, words=("cell",))]


def losses_of(cell: Cell) -> list[str]:
    """Tokens, loss with the memory, loss without it."""
    off = "" if cell.run.is_plain else shown(cell.over_seeds(lambda result: result.loss_memory_off))
    return [f"{cell.results[0].tokens / 1e6:,.2f}M", shown(cell.over_seeds(loss)), off]


def provenance(study: Study, runs: list[Run], results: list[Result], failures: list[Failure]) -> list[str]:
    of_run, rows = {result.run.name: result for result in results}, []
    for run in runs:
        reached = ["", "", ""]
        if result := of_run.get(run.name):
            reached = [
                "" if result.loss is None else f"{result.loss:.4f}",
                result.model_sha256[:HASH],
                result.data_sha256,
            ]
        recipe = run.recipe
        rows.append([run.number, run.name, recipe.seed, recipe.data.seed, f"{recipe.steps:,}", *reached])
    header = ["", "run", "seed", "seed of rows", "steps", "validation loss", "model sha256", "training shards"]
    parts = ["## Runs", table(header, rows, words=("run",))]
    if missing := [run.name for run in runs if not is_done(study, run)]:
        reasons = {failure.run: str(failure) for failure in failures}
        parts += ["### Not finished", bullets(reasons.get(name, name) for name in missing)]
    if evaluated := evaluated_data(results):
        parts += ["### Data of the evaluations", table(["task", "path", "sha256"], evaluated, words=("task", "path"))]
    commands = [step.command for run in runs for step in run_steps(study, run)]
    text = "\n".join(map(readable, commands))
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    made = f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, Python {platform.python_version()}, {libraries}."
    return [*parts, "### Commands", f"```sh\n{text}\n```", f"Written {made}"]


def evaluated_data(results: list[Result]) -> list[tuple[str, str, str]]:
    """Of each task: where its data lay, and their hash."""
    found = {
        (task, str(data["path"]), str(data["sha256"])[:HASH])
        for result in results
        for evaluation in result.evaluations.values()
        for task, measured in evaluation["tasks"].items()
        if (data := measured.get("data"))
    }
    return sorted(found)


def image(words: str, name: str) -> str:
    return f"![{words}]({PICTURES}/{name})"
