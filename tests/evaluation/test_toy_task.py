"""A new evaluation task: this file registers one, and launch/evaluate.py offers, runs, records, shows and plots it."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from harness import call_script
from rich.table import Table

from infini_ds.data.batches import pad_documents
from infini_ds.evaluation.evaluation_file import read_evaluation
from infini_ds.evaluation.model_loading import EvaluatedModel, load_evaluated_model
from infini_ds.evaluation.plots import plt, save_figure
from infini_ds.evaluation.scoring import memory_settings, token_losses
from infini_ds.evaluation.tables import MEMORY_LABELS, new_table
from infini_ds.evaluation.task import (
    TASKS,
    EvaluationContext,
    EvaluationTask,
    Headline,
    TaskResult,
    TidyRow,
    add_integer,
    register_task,
)


@dataclass(frozen=True)
class RepetitionResult(TaskResult):
    """loss: mean over the tokens of all repetitions except the first, by setting of the memory."""

    repetitions: int
    loss: dict[str, float]

    def tidy_rows(self) -> list[TidyRow]:
        return [TidyRow(setting, "loss", loss) for setting, loss in self.loss.items()]


class Repetition(EvaluationTask[RepetitionResult]):
    name = "repetition"
    help = "loss on a sentence that is repeated"
    result_type = RepetitionResult

    def add_arguments(self, parser: argparse._ArgumentGroup) -> None:
        add_integer(parser, "--repetitions", 2, 8, "of the sentence")

    def run(self, model: EvaluatedModel, context: EvaluationContext) -> RepetitionResult:
        number = context.arguments.repetitions
        ids = model.tokenizer.encode(" import the module and read the file", add_special_tokens=False)
        batch = pad_documents([ids * number])
        return RepetitionResult(
            number,
            {
                setting: token_losses(model.model, batch, setting, batch)[0, len(ids) :].mean().item()
                for setting in memory_settings(model.model)
            },
        )

    def headline(self, result: RepetitionResult) -> Headline:
        return Headline("loss", result.loss["on"])

    def table(self, result: RepetitionResult) -> Table:
        table = new_table(f"a sentence, {result.repetitions} times", "", "loss")
        for setting, loss in result.loss.items():
            table.add_row(MEMORY_LABELS[setting], f"{loss:.4f}")
        return table

    def plot(self, result: RepetitionResult, folder: Path) -> None:
        figure, axes = plt.subplots()
        axes.bar(list(result.loss), list(result.loss.values()))
        save_figure(figure, folder / "repetition.png")


@pytest.fixture
def registered():
    """The toy task is registered while a test runs."""
    register_task(Repetition)
    yield
    del TASKS["repetition"]


def test_the_help_text_has_the_task_and_its_option(registered):
    text = call_script("launch/evaluate.py", "--help").stdout
    assert "task repetition:" in text and "loss on a sentence that is repeated" in text and "--repetitions" in text


def test_the_task_is_run_recorded_shown_and_plotted(registered, exported, tmp_path):
    arguments = [exported, "--tasks", "repetition", "--repetitions", "5", "--out", tmp_path]
    done = call_script("launch/evaluate.py", *arguments)
    entry = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]["repetition"]
    model = load_evaluated_model(str(exported), torch.device("cpu"))
    ids = torch.tensor([model.tokenizer.encode(" import the module and read the file", add_special_tokens=False) * 5])
    for setting, use_memory in (("on", True), ("off", False)):
        with torch.no_grad():
            losses = model.model(ids, labels=ids, use_memory=use_memory, loss_reduction="none").loss
        assert entry["loss"][setting] == pytest.approx(losses[0, ids.shape[1] // 5 :].mean().item(), abs=1e-5)
    assert entry["loss"]["other"] == pytest.approx(entry["loss"]["on"], abs=1e-5), "the other document is the same"
    assert entry["repetitions"] == 5 and entry["seed"] == 0 and "--repetitions 5" in entry["command"]
    assert "a sentence, 5 times" in done.stdout and f"{entry['loss']['off']:.4f}" in done.stdout
    assert f"repetition: loss {entry['loss']['on']:.4f}" in done.stdout
    assert (tmp_path / "repetition.png").read_bytes().startswith(b"\x89PNG")
    result = read_evaluation(tmp_path).result("repetition")
    assert result.loss == entry["loss"] and len(result.tidy_rows()) == 3


def test_a_mistake_in_its_option_is_one_sentence(registered, exported):
    done = call_script("launch/evaluate.py", exported, "--repetitions", "1", code=2)
    assert done.stderr == "error: --repetitions 1 must be at least 2\n"


def test_two_tasks_of_one_name_are_refused(registered):
    with pytest.raises(AssertionError, match="two evaluation tasks are named repetition"):
        register_task(Repetition)
