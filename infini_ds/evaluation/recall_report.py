"""The report of a model of facts: accuracy by distance for each setting of the memory, training, a story and answers.

It is written from the run's evaluation.json, and from a story that the model reads and is asked about.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infini_ds.checkpoint.manifest import read_manifest
from infini_ds.conversion.locate import locate
from infini_ds.evaluation.accuracy import AccuracyResult, ScoredPoint, ScoredTask
from infini_ds.evaluation.asking import (
    Answers,
    StoryReader,
    default_facts,
    describe_reading,
    format_answers,
    format_story,
    shorten,
)
from infini_ds.evaluation.evaluation_file import read_evaluation
from infini_ds.evaluation.html import bullets, table, to_html
from infini_ds.evaluation.model_loading import EvaluatedModel, ModelFacts
from infini_ds.evaluation.plots import memory_style, plot_loss_curves, plt, save_figure
from infini_ds.evaluation.recall_story import LearnedFacts, known_facts, learned_facts
from infini_ds.evaluation.tables import MEMORY_LABELS
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.utils.atomic import write_text_atomic
from infini_ds.utils.counts import short_count
from infini_ds.utils.errors import UserError

PAIRS = 4  # facts in the story, as in the evaluation
ACCURACY_PLOT, LOSS_PLOT = "accuracy.png", "loss.png"


@dataclass(frozen=True)
class RecallReport:
    """What the report shows.

    Attributes:
        facts: of the evaluated model. command: that evaluated it.
        segment_length: of the model. learned: the facts of its training text.
        scored: the accuracy at each distance. headline: the point that the report begins with.
        step, tokens: of training. metrics: all that the run recorded.
        reader: has read the story. answers: to the question about it.
    """

    run: Path
    facts: ModelFacts
    command: str
    segment_length: int
    learned: LearnedFacts
    scored: ScoredTask
    headline: ScoredPoint
    step: int
    tokens: int
    metrics: list[dict[str, float]]
    reader: StoryReader
    answers: Answers

    @property
    def farthest(self) -> int | None:
        """Most segments between facts and question in training."""
        tokens = self.learned.farthest
        return None if tokens is None else math.ceil(tokens / self.segment_length)


def make_recall_report(run: Path, model: EvaluatedModel, segments: int) -> RecallReport:
    """Collect what was measured of a run's newest checkpoint, and ask it about a story.

    Args:
        model: the checkpoint, or its export.
        segments: distance of the headline and of the story.
    Raises:
        UserError: the folder is not a run, the run learned no facts, or its model was not evaluated on them.
    """
    location = locate(run)
    if location.checkpoint is None:
        raise UserError(f"{run} is an export: name the run, whose folder also has the training's metrics")
    learned = learned_facts(run)
    folder = run / "evaluation"
    evaluation = read_evaluation(folder)
    result = evaluation.result("recall") if evaluation else None
    scored = result.tasks.get(learned.task) if isinstance(result, AccuracyResult) else None
    if evaluation is None or scored is None or evaluation.model.sha256 != model.sha256:
        raise UserError(
            f"{folder} has no accuracy of this model: evaluate it with --tasks recall --recall {learned.task} first"
        )
    learned = known_facts(learned, model.tokenizer, run)
    reader = StoryReader(model, learned)
    reader.read(default_facts(learned, PAIRS, reader.seed), segments)
    state = read_manifest(location.checkpoint).state
    return RecallReport(
        run=run,
        facts=evaluation.model,
        command=str(evaluation.tasks["recall"]["command"]),
        segment_length=reader.model.config.segment_length,
        learned=learned,
        scored=scored,
        headline=next((p for p in scored.points if p.segments == segments), scored.points[-1]),
        step=state.step,
        tokens=state.tokens,
        metrics=read_metrics(run),
        reader=reader,
        answers=reader.ask(reader.story.keys[1]),
    )


def write_recall_report(report: RecallReport, next_commands: Sequence[str]) -> Path:
    """Write report.md, report.html and their plots to the folder report/ of the run, and return the page.

    Args:
        next_commands: what the reader can run next.
    """
    folder = report.run / "report"
    folder.mkdir(exist_ok=True)
    plot_by_distance(report, folder / ACCURACY_PLOT)
    plot_loss_curves(report.metrics, folder / LOSS_PLOT)
    title = f"{report.run.name}: facts that only the memory holds"
    text = format_report(report, title, next_commands)
    write_text_atomic(folder / "report.md", text)
    write_text_atomic(folder / "report.html", to_html(text, title, folder))
    return folder / "report.html"


def plot_by_distance(report: RecallReport, file: Path) -> None:
    """Plot the accuracy over the segments between facts and question, one curve for each setting of the memory."""
    points = report.scored.points
    segments = [point.segments for point in points]
    figure, axes = plt.subplots(layout="constrained")
    for setting in points[0].accuracy:
        values = [point.accuracy[setting] for point in points]
        axes.plot(segments, values, marker="o", markersize=5, **memory_style(setting))
    axes.axhline(report.scored.chance, color="0.5", linestyle="--", linewidth=1, label="chance")
    axes.set_xscale("log" if min(segments) > 0 else "symlog")
    axes.set_xticks(segments, [f"{number:,}" for number in segments])
    axes.minorticks_off()
    if report.farthest is not None:
        label = f"farthest in training: {report.farthest}"
        axes.axvline(report.farthest, color="0.6", linestyle=":", linewidth=1.2, label=label)
    axes.set(
        ylim=(-0.03, 1.03),
        xlabel=f"segments of {report.segment_length} words between facts and question",
        ylabel="accuracy",
        title="Answers by distance",
    )
    figure.legend(loc="outside lower center", ncols=3)
    save_figure(figure, file)


def headline_sentence(report: RecallReport) -> str:
    """Return the accuracies at the headline's distance as a sentence."""
    point, chance = report.headline, report.scored.chance
    others = "; ".join(f"{MEMORY_LABELS[s]} {value:.3f}" for s, value in point.accuracy.items() if s != "on")
    return (
        f"After {point.segments:,} segments of filler, {report.segment_length * point.segments:,} words, the model "
        f"answers {point.accuracy['on']:.1%} of {point.answers:,} questions correctly "
        f"(accuracy {point.accuracy['on']:.3f}; {others}; chance {chance:.3f})."
    )


def describe_model(report: RecallReport) -> list[str]:
    """Return lines on the model, its training and its evaluation, in Markdown."""
    config = report.reader.model.config
    longest = f", with at most {report.farthest} segments between facts and question" if report.farthest else ""
    return [
        f"model: {short_count(report.facts.parameters)} parameters, {config.num_layers} layers of width "
        f"{config.hidden_size}, segments of {report.segment_length} words, in `{report.facts.path}` "
        f"(sha256 {report.facts.sha256[:12]})",
        f"trained: {report.step:,} steps, {report.tokens:,} tokens{longest}",
        f"evaluated by `{report.command}`",
    ]


def format_report(report: RecallReport, title: str, next_commands: Sequence[str]) -> str:
    """Return the report in Markdown."""
    settings = list(report.scored.points[0].accuracy)
    distances = table(
        ["segments between", "answers", *(MEMORY_LABELS[setting] for setting in settings), "chance"],
        [
            [f"{p.segments:,}", p.answers, *(f"{p.accuracy[s]:.3f}" for s in settings), f"{report.scored.chance:.3f}"]
            for p in report.scored.points
        ],
    )
    story, answers = report.reader.story, report.answers
    of_story = table(
        ["memory", "answer", "", "likeliest answers"],
        [
            [
                MEMORY_LABELS[setting],
                f"**{candidates[0].word}**",
                "right" if answers.is_right(setting) else "wrong",
                ", ".join(f"{word} {probability:.3f}" for word, probability in candidates),
            ]
            for setting, candidates in answers.candidates.items()
        ],
        text_columns=("memory", "answer", "", "likeliest answers"),
    )
    commands = "\n".join(next_commands)
    return f"""# {title}

**{headline_sentence(report)}**

{bullets(describe_model(report))}

## By distance
Local attention sees one segment only, so nothing but the memory connects a question with its fact.

![Accuracy by the number of segments between facts and question]({ACCURACY_PLOT})

{distances}

## Training
The loss is taken over the answers alone.

![Loss over the steps]({LOSS_PLOT})

## A story
> {story.fact_text}
>
> {shorten(story)}
>
> ? {answers.key}

There are {story.segments:,} segments, {story.sentences:,} sentences of filler, between the facts and the question. The
right answer is **{answers.value}**. The other document is about the same names, and says
{answers.key} {answers.other_value}.

{of_story}

{describe_reading(report.reader)} The question was answered in {1000 * answers.seconds:.1f} ms,
from a copy of the cache.

## Ask yourself
```sh
{commands}
```
"""


def print_recall_report(report: RecallReport, page: Path, next_commands: Sequence[str]) -> None:
    """Print the headline, the story with its answers, where the report is, and what to run next."""
    print(f"\n{headline_sentence(report)}\n\n--- a story")
    print(f"{format_story(report.reader)}\n\n{format_answers(report.answers)}")
    print(f"\nreport  {page}\n\n--- try next\n" + "\n".join(next_commands), flush=True)
