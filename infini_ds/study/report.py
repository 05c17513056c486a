"""Write a study's report: report.md, its figures, and report.html, which embeds them.

The report is a function of results.csv, gates.csv and provenance.json in the study's folder, and of nothing else.
"""

import shutil
from pathlib import Path

from infini_ds.evaluation.html import bullets, table, to_html
from infini_ds.study import arms, figures
from infini_ds.study.collect import collect_provenance, collect_results
from infini_ds.study.commands import StudyCommands
from infini_ds.study.conclusions import (
    HEADLINES,
    TASKS,
    conclude,
    finetuned_plain,
    format_spread,
    loss,
    main_cells,
    plural,
    pretrained_and_finetuned,
)
from infini_ds.study.grid import Run
from infini_ds.study.provenance import Provenance, read_provenance, write_provenance
from infini_ds.study.reference_results import ACCURACIES, GPT_NEO, STEPS
from infini_ds.study.results import Cell, RunResult, gate_movements, group_by_cell, spread
from infini_ds.study.results_csv import read_results, write_results
from infini_ds.utils.atomic import write_text_atomic
from infini_ds.utils.errors import UserError

FIGURES = "figures"  # folder beside the report
HASH_DIGITS = 16  # digits of a SHA-256 that are shown


def report_study(commands: StudyCommands, runs: list[Run], failures: dict[str, str]) -> Path:
    """Collect the results of the finished runs, write the study's tables and its report, and return report.html.

    Args:
        failures: name of a run -> why it failed, of the runs that were tried now.
    Raises:
        UserError: no run is finished.
    """
    folder = commands.study.folder
    results = collect_results(commands.study, runs)
    if not results:
        raise UserError(f"no run in {folder} is finished, so there is nothing to report: execute the study first")
    write_results(results, folder)
    write_provenance(collect_provenance(commands, runs, failures), folder)
    return write_report(folder)


def write_report(folder: Path) -> Path:
    """Write report.md and report.html from the tables in a study's folder, and return report.html."""
    provenance, results = read_provenance(folder), read_results(folder)
    pictures = folder / FIGURES
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    cells = group_by_cell(results)
    sections = [
        f"# {provenance.study}",
        summary(provenance, results),
        "## Conclusions",
        bullets(conclude(cells, provenance.context_length)),
        *arms_section(cells, provenance.context_length, pictures),
        *pretraining_section(cells, provenance.context_length, pictures),
        *finetuning_section(cells, provenance.context_length, pictures),
        *gates_section(cells, provenance.context_length, pictures),
        *all_cells_section(cells, provenance.headlines, pictures),
        *runs_section(provenance, results),
    ]
    text = "\n\n".join(sections) + "\n"
    write_text_atomic(folder / "report.md", text)
    page = folder / "report.html"
    write_text_atomic(page, to_html(text, provenance.study, folder))
    return page


def summary(provenance: Provenance, results: list[RunResult]) -> str:
    seeds = sorted({run.seed for run in provenance.runs})
    parameters = f", {provenance.parameters:,} parameters" if provenance.parameters else ""
    lengths = ", ".join(f"{length:,}" for length in sorted({result.run.context_length for result in results}))
    finished = sum(run.finished for run in provenance.runs)
    return bullets(
        [
            f"{plural(len(provenance.runs), 'run')}, {finished} finished. A cell of the grid is one configuration, "
            f"trained with {plural(len(seeds), 'seed')} ({', '.join(map(str, seeds))}) for the weights and the "
            "order of rows.",
            f"Model: preset `{provenance.preset}`{parameters}. Text: `{provenance.source}`, rows of {lengths} tokens, "
            f"documents of {provenance.document_tokens:,.0f} tokens on average. The memory is reset at the end of a "
            "document, so it has little effect if segments are not much shorter than documents.",
            "Losses are in nats per token, on validation rows. They cannot be compared between texts, tokenizers or "
            "lengths of rows. The figure after ± is the standard deviation of single runs over seeds; bands in figures "
            "reach from the lowest seed to the highest.",
            "All figures and tables are computed from `results.csv` and `gates.csv`, which lie beside this report.",
        ]
    )


def pretraining_section(cells: list[Cell], context_length: int, pictures: Path) -> list[str]:
    rows: list[list[object]] = []
    panels: dict[str, list[Cell]] = {}
    plain = [cell for cell in cells if not cell.run.uses_memory and cell.run.context_length == context_length]
    main = main_cells(cells, context_length)
    axes: list[str] = []
    for pretrained, finetuned in pretrained_and_finetuned(cells):
        one, other = pretrained.over_seeds(loss), finetuned.over_seeds(loss)
        if one and other:
            run, axes = finetuned.run, list(finetuned.run.axes)
            shape = [run.segment_length, f"{run.context_length:,}", run.memory_rule, run.gate_schedule]
            disjoint = "yes" if one.ranges_disjoint(other) else "no"
            if min(len(one.values), len(other.values)) < 2:
                disjoint = "one seed"
            difference = f"{one.mean - other.mean:+.4f}"
            row = [*loss_columns(pretrained), *loss_columns(finetuned), difference, disjoint]
            rows.append([*shape, *run.axes.values(), *row])
            if finetuned in main:
                panel = panels.setdefault(f"segments of {run.segment_length}", [*plain])
                panel += [cell for cell in (pretrained, finetuned) if cell not in panel]
    if not rows:
        return []
    parts = ["## Pre-training or fine-tuning"]
    if panels:
        figures.plot_pretraining(panels, pictures / "pretraining-or-finetuning.png")
        parts.append(image("Validation loss over all tokens seen", "pretraining-or-finetuning.png"))
    columns = [f"{way}: {name}" for way in ("pre-trained", "fine-tuned") for name in ("tokens", "loss", "memory off")]
    header = ["segment length", "context length", "memory rule", "gate schedule", *axes, *columns]
    header += ["difference", "ranges disjoint"]
    return [
        *parts,
        table(header, rows, text_columns=("memory rule", "gate schedule")),
        "Tokens include those of the plain GPT-Neo that fine-tuning starts from. The learning rate of fine-tuning "
        "starts again from its own warm-up; that of pre-training decays once over all steps.",
    ]


def arms_section(cells: list[Cell], context_length: int, pictures: Path) -> list[str]:
    best = arms.best_of_arms(cells, context_length)
    if len(best) < 2 or not arms.plot_arms(best, pictures / "arms.png"):
        return []
    return [
        "## Arms side by side",
        image("Loss of each arm less that of the first one, by position and by distance", "arms.png"),
        arms.arms_table(best),
        "Of each arm that starts from no other one the cell with the lowest validation loss, among those with most "
        "seeds. Bigrams of earlier segments are tokens that complete a bigram of their document, as `natural_recall` "
        "counts them; evaluation.options.segment_tokens makes arms of different segments comparable.",
    ]


def finetuning_section(cells: list[Cell], context_length: int, pictures: Path) -> list[str]:
    finetuned = [cell for cell in main_cells(cells, context_length) if cell.run.start_from]
    if not finetuned:
        return []
    plain = finetuned_plain(cells, context_length)
    figures.plot_finetuning([*([plain] if plain else []), *finetuned], pictures / "figure-4.png")
    parts = [
        "## During fine-tuning (the study's Figure 4)",
        image("BLiMP, (Super)GLUE and validation loss during fine-tuning, by segment length", "figure-4.png"),
        "The published model is a different one: vocabulary of 10,000, width 516, 2 layers, 4 heads, rotary positions, "
        "trained for one epoch of TinyStories with one seed.",
    ]
    for task, title in TASKS.items():
        parts += [f"### {title}", published_table(task, finetuned, plain)]
    return parts


def published_table(task: str, finetuned: list[Cell], plain: Cell | None) -> str:
    """Return the published accuracies and those of this study, by segment length and step."""
    metric = HEADLINES[task]
    cells = [*finetuned, *([plain] if plain else [])]
    steps = sorted({step for cell in cells for result in cell.results for step in result.curve(task, metric)})
    rows: list[list[object]] = []
    for segment_length in sorted({*ACCURACIES[task], *(cell.run.segment_length for cell in finetuned)}):
        of_length: list[Cell | None] = [cell for cell in finetuned if cell.run.segment_length == segment_length]
        published = [f"{accuracy:.3f}" for accuracy in ACCURACIES[task].get(segment_length, ())] or [""] * len(STEPS)
        for cell in of_length or [None]:
            label = f"{segment_length}, {cell.run.axes_text}" if cell and cell.run.axes else segment_length
            rows.append([label, *published, *score_columns(cell, task, steps)])
    rows.append(["plain", *[""] * (len(STEPS) - 1), f"{GPT_NEO[task]:.3f}", *score_columns(plain, task, steps)])
    columns = [*(f"published, step {step:,}" for step in STEPS), *(f"this study, step {step:,}" for step in steps)]
    note = "" if steps else "Not measured in this study."
    if task == "glue" and steps:
        note = f"In this study the mean over {', '.join(glue_tasks(cells))}."
    return "\n\n".join(filter(None, [table(["segment length", *columns], rows), note]))


def glue_tasks(cells: list[Cell]) -> list[str]:
    metrics = {metric for cell in cells for result in cell.results for metric in result.metrics("glue")}
    return sorted(metric.split("/")[1] for metric in metrics if "/" in metric)


def score_columns(cell: Cell | None, task: str, steps: list[int]) -> list[str]:
    if cell is None:
        return [""] * len(steps)
    curves = [result.curve(task, HEADLINES[task]) for result in cell.results]
    return [format_spread(spread(curve.get(step) for curve in curves), ".3f") for step in steps]


def gates_section(cells: list[Cell], context_length: int, pictures: Path) -> list[str]:
    rows = [movement_row(cell) for cell in cells if gate_movements(cell)]
    if not rows:
        return []
    header = [
        *("cell", "net change", "path length", "largest possible change", "path in the first half of steps"),
        "learning rate in the first half of steps",
    ]
    return [
        "## Gates (the study's Figures 5 and 6)",
        *gate_figures(cells, context_length, pictures),
        "### How far they moved",
        table(header, rows, text_columns=("cell",)),
        "Values of beta, whose sigmoid is the gate; means over heads and seeds. *Net change* is the distance between "
        "start and end, *path length* the sum of the changes between recorded steps, *largest possible change* the sum "
        "of the learning rates, the most that Adam can move a value.",
    ]


def gate_figures(cells: list[Cell], context_length: int, pictures: Path) -> list[str]:
    """Plot the gates of each arm by context length, where there are several, and by segment length."""
    linear = [cell for cell in cells if cell.run.uses_memory and cell.run.memory_rule == "linear"]
    linear = [cell for cell in linear if all(result.gates for result in cell.results)]
    names = list(dict.fromkeys(cell.run.arm for cell in linear))
    images = []
    for arm in names:
        for length in sorted({cell.run.segment_length for cell in linear if cell.run.arm == arm}):
            chosen = [cell for cell in linear if (cell.run.arm, cell.run.segment_length) == (arm, length)]
            if len({cell.run.context_length for cell in chosen}) > 1:
                title, file = f"Gates by context length: {arm}, segments of {length}", f"figure-5-{arm}-s{length}.png"
                figures.plot_gates(chosen, lambda run: run.context_length, "rows", title, pictures / file)
                images.append(image(title, file))
    for arm in names:
        chosen = [cell for cell in linear if (cell.run.arm, cell.run.context_length) == (arm, context_length)]
        if chosen:
            title, file = f"Gates by segment length: {arm}, rows of {context_length:,}", f"figure-6-{arm}.png"
            figures.plot_gates(chosen, lambda run: run.segment_length, "segments", title, pictures / file)
            images.append(image(title, file))
    return images


def movement_row(cell: Cell) -> list[str]:
    movements = gate_movements(cell)
    columns = [
        ([one.net_change for one in movements], ".2f"),
        ([one.path_length for one in movements], ".2f"),
        ([one.max_change for one in movements], ".2f"),
        ([one.first_half_of_path for one in movements], ".0%"),
        ([one.first_half_of_learning_rate for one in movements], ".0%"),
    ]
    return [cell.name, *(f"{sum(values) / len(values):{form}}" for values, form in columns)]


def all_cells_section(cells: list[Cell], headlines: dict[str, str], pictures: Path) -> list[str]:
    figures.plot_all_cells(cells, pictures / "all-cells.png")
    parts = ["## All cells", image("Last validation loss of every cell and seed", "all-cells.png")]
    if figures.plot_gain_by_position([cell for cell in cells if cell.run.uses_memory], pictures / "gain.png"):
        parts.append(image("Loss reduction by the memory, by position in the row", "gain.png"))
    header = ["cell", "seeds", "tokens", "validation loss", "memory off", "reduction by memory"]
    header += [f"{TASKS.get(task, task)}: {metric.replace('_', ' ')}" for task, metric in headlines.items()]
    rows = []
    for cell in cells:
        scores = [format_spread(cell.last(task, metric), ".3f") for task, metric in headlines.items()]
        gain = format_spread(cell.over_seeds(lambda result: result.gain), "+.4f") if cell.run.uses_memory else ""
        rows.append([cell.name, len(cell.results), *loss_columns(cell), gain, *scores])
    return [*parts, table(header, rows, text_columns=("cell",))]


def loss_columns(cell: Cell) -> list[str]:
    """Return tokens, loss with the memory on, and loss with it off."""
    off = format_spread(cell.over_seeds(lambda result: result.loss_memory_off)) if cell.run.uses_memory else ""
    return [f"{cell.results[0].tokens / 1e6:,.2f}M", format_spread(cell.over_seeds(loss)), off]


def runs_section(provenance: Provenance, results: list[RunResult]) -> list[str]:
    by_name = {result.run.run: result for result in results}
    rows: list[list[object]] = []
    for run in provenance.runs:
        reached = ["", "", ""]
        if result := by_name.get(run.name):
            last_loss = "" if result.loss is None else f"{result.loss:.4f}"
            reached = [last_loss, result.sha256[:HASH_DIGITS], run.data_sha256]
        rows.append([run.number, run.name, run.seed, run.data_seed, f"{run.steps:,}", *reached])
    header = ["", "run", "seed", "data seed", "steps", "validation loss", "model SHA-256", "training shards"]
    parts = ["## Runs", table(header, rows, text_columns=("run",))]
    unfinished = [run for run in provenance.runs if not run.finished]
    if missing := [f"{run.name}: {run.failure}" if run.failure else run.name for run in unfinished]:
        parts += ["### Not finished", bullets(missing)]
    if data := [(each.task, each.path, each.sha256[:HASH_DIGITS]) for each in provenance.evaluation_data]:
        columns = ["task", "path", "SHA-256"]
        parts += ["### Data of the evaluations", table(columns, data, text_columns=("task", "path"))]
    commands = "\n".join(command for run in provenance.runs for command in run.commands)
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions.items())
    return [*parts, "### Commands", f"```sh\n{commands}\n```", f"Written {provenance.written} UTC, {versions}."]


def image(title: str, file: str) -> str:
    return f"![{title}]({FIGURES}/{file})"
