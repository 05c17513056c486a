"""launch/evaluate.py: what evaluation.json holds, the cache, ranks and batch sizes, external models, mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import call_script, finish_ranks, start_ranks
from torch.testing import assert_close

from infini_ds.evaluation.evaluation_file import read_evaluation
from infini_ds.evaluation.model_loading import load_evaluated_model, model_sha256
from infini_ds.evaluation.task import TASKS
from infini_ds.model import BlockSchedule

CPU = torch.device("cpu")


def read(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def test_every_result_names_its_model_data_and_command(evaluated, exported):
    found = read(evaluated)
    assert found["model"]["model_type"] == "infini_gpt_neo"
    sha256 = load_evaluated_model(str(exported), CPU).sha256
    assert found["model"]["sha256"] == sha256, "a checkpoint and its export are the same model"
    assert found["command"].startswith("python") and "--segments 0 2" in found["command"]
    assert set(found["tasks"]) == {"position", "recall", "blimp"}
    for result in found["tasks"].values():
        assert len(result["data"]["sha256"]) == 64 and result["data"]["path"]
        assert result["command"] == found["command"] and result["seed"] == found["seed"] == 0
    for task in found["tasks"]:
        assert (evaluated / f"{task}.png").stat().st_size > 10_000


def test_results_are_read_back_typed(evaluated):
    """With the headline of each task and its tidy rows: the same numbers as in the JSON."""
    evaluation, found = read_evaluation(evaluated), read(evaluated)["tasks"]
    headlines = {name: TASKS[name].headline(evaluation.result(name)) for name in found}
    assert headlines["position"] == ("loss", found["position"]["memory"]["on"]["loss"])
    assert headlines["blimp"] == ("accuracy", found["blimp"]["accuracy"])
    assert headlines["recall"].name == "mean_accuracy" and 0 <= headlines["recall"].value <= 1
    assert evaluation.result("glue") is None

    rows = {name: {row[:2]: row.value for row in evaluation.result(name).tidy_rows()} for name in found}
    assert {name: rows[name]["on", headline.name] for name, headline in headlines.items()} == {
        name: headline.value for name, headline in headlines.items()
    }
    for setting, losses in found["position"]["memory"].items():
        assert rows["position"][setting, "loss"] == losses["loss"]
        assert rows["position"][setting, "loss/segment_3"] == losses["by_segment"]["loss"][2]
    assert rows["position"]["off", "gain"] == found["position"]["gained"]["off"]["mean"]
    point = found["recall"]["tasks"]["passkey,digits=2"]["points"][3]
    place = f"accuracy/passkey,digits=2/{point['segments']}_segments/depth_{point['depth']:g}"
    assert {setting: rows["recall"][setting, place] for setting in point["accuracy"]} == point["accuracy"]
    assert rows["blimp"]["on", "accuracy/islands"] == found["blimp"]["phenomena"]["islands"]
    assert rows["blimp"]["on", "pairs"] == 4


def test_finished_parts_are_not_computed_again_and_other_tasks_stay(evaluated, runs, sentences, tmp_path):
    out = tmp_path / "again"
    out.mkdir()
    for name in ("evaluation.json", "parts.json"):
        (out / name).write_text((evaluated / name).read_text())
    parts = json.loads((out / "parts.json").read_text())
    for part in parts.values():
        if part["part"] == "blimp/islands_1":
            part["result"]["accuracy"] = 0.123
    (out / "parts.json").write_text(json.dumps(parts))
    done = call_script("launch/evaluate.py", runs / "one", "--tasks", "blimp", "--blimp", sentences, "--out", out)
    assert read(out)["tasks"]["blimp"]["paradigms"]["islands_1"]["accuracy"] == 0.123
    assert read(out)["tasks"]["position"] == read(evaluated)["tasks"]["position"]
    assert "BLiMP: 4 pairs" in done.stdout and "recall" not in done.stdout
    call_script("launch/evaluate.py", runs / "two", "--tasks", "blimp", "--blimp", sentences, "--out", out)
    other = read(out)
    assert set(other["tasks"]) == {"blimp"}, "results of another model are not kept"
    assert other["tasks"]["blimp"]["paradigms"]["islands_1"]["accuracy"] in (0, 0.5, 1)


@pytest.mark.timeout(240)
def test_two_ranks_and_other_batch_sizes_give_the_same(evaluated, arguments, tmp_path):
    given = [*map(str, arguments), "--out", str(tmp_path), "--batch-tokens", "700"]
    outputs = finish_ranks(start_ranks(2, *given, script="launch/evaluate.py"))
    assert outputs[1] == ""
    one, two = read(evaluated)["tasks"], read(tmp_path)["tasks"]
    assert two["recall"]["tasks"] == one["recall"]["tasks"]
    assert two["blimp"]["paradigms"] == one["blimp"]["paradigms"]
    for memory in ("on", "off", "other"):
        of_one, of_two = (each["position"]["memory"][memory] for each in (one, two))
        for key in ("loss", "by_row"):
            assert_close(torch.tensor(of_one[key]), torch.tensor(of_two[key]), rtol=0, atol=1e-5)
        assert_close(torch.tensor(of_one["by_segment"]["loss"]), torch.tensor(of_two["by_segment"]["loss"]))


def test_an_external_model_is_a_baseline(gpt2, shards, sentences, tmp_path):
    options = ["--data", shards, "--rows", "2", "--blimp", sentences]
    options += ["--recall", "pairs,queries=2", "--segments", "1", "--examples", "2"]
    done = call_script(
        "launch/evaluate.py", gpt2, "--tasks", "position", "recall", "blimp", *options, "--out", tmp_path
    )
    found = read(tmp_path)
    assert found["model"]["model_type"] == "gpt2" and list(found["tasks"]["position"]["memory"]) == ["on"]
    assert found["tasks"]["position"]["gained"] == {} and "memory off" not in done.stdout


def test_help_shows_every_task_and_its_options():
    text = call_script("launch/evaluate.py", "--help").stdout
    for words in ("task position:", "task recall:", "task blimp:", "task glue:", "--rows", "--finetune", "--segments"):
        assert words in text, words


def test_mistakes_are_one_sentence(runs, exported, sentences, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.jsonl").write_text('{"text": "no pair"}\n')
    hidden = tmp_path / "without" / ".ipynb_checkpoints"
    hidden.mkdir(parents=True)
    (hidden / "notes.jsonl").write_text('{"text": "no pair"}\n')
    cases = {
        (runs / "one", "--tasks", "positon"): "--tasks positon is not a task: did you mean position?",
        (runs / "one", "--rows", "-1"): "--rows -1 must be at least 0",
        (runs / "one", "--segments", "1", "-2"): "--segments -2 must be at least 0",
        (runs / "one", "--examples", "many"): "--examples many must be an integer of at least 2",
        (tmp_path / "none",): "no such folder",
        ("no-such/model",): "no-such/model: no such folder, nor a model on the hub",
        (tmp_path,): "is neither an exported folder",
        (exported, "--tasks", "position"): "name a folder of data_prep with --data",
        (exported, "--data", tmp_path): "is not a finished folder of prepared data",
        (exported, "--tasks", "blimp", "--blimp", hidden.parent): "holds no .jsonl or .json files",
        (exported, "--tasks", "blimp", "--blimp", empty): "each line is JSON with sentence_good and sentence_bad",
        (exported, "--tasks", "blimp"): "nyu-mll/blimp: no such folder, and no such dataset on the hub",
        (exported, "--tasks", "recall", "--recall", "pears"): "did you mean pairs?",
        (exported, "--tasks", "blimp", "--blimp", sentences, "--out", "/proc/x"): "name another folder, with --out",
    }
    for arguments, sentence in cases.items():
        error = call_script("launch/evaluate.py", *arguments, code=2).stderr
        assert sentence in error and error.startswith("error: ") and error.count("\n") == 1, error


@pytest.mark.parametrize("text", ["", '{"a', "[]"])
@pytest.mark.parametrize("name", ["parts.json", "evaluation.json"])
def test_damaged_results_are_named(name, text, exported, shards, tmp_path):
    (tmp_path / name).write_text(text)
    arguments = (exported, "--data", shards, "--rows", "1", "--out", tmp_path)
    error = call_script("launch/evaluate.py", *arguments, code=2).stderr
    assert error.startswith(f"error: {tmp_path / name} is damaged (") and "remove it, and evaluate again" in error
    (tmp_path / name).unlink()
    call_script("launch/evaluate.py", *arguments)


def test_damaged_data_are_named(exported, shards, runs, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shards, data)
    shutil.copytree(runs / "one", run)
    (data / "tokenizer" / "tokenizer.json").write_text("{")
    (run / "recipe.yaml").write_text("data: [")
    for arguments, sentence in (
        ((exported, "--data", data), f"--data: {data}/tokenizer/tokenizer.json is damaged ("),
        ((run,), f"the run's recipe {run}/recipe.yaml cannot be read as YAML: "),
    ):
        error = call_script("launch/evaluate.py", *arguments, "--out", tmp_path / "out", code=2).stderr
        assert sentence in error and error.startswith("error: ") and error.count("\n") == 1, error


def test_the_hash_covers_what_the_model_computes(exported):
    model = load_evaluated_model(str(exported), CPU).model
    before = model_sha256(model)
    model.block_schedule = BlockSchedule(segments_per_block=3)
    model.config._name_or_path = "elsewhere"
    assert model_sha256(model) == before
    with torch.no_grad():
        model.transformer.h[1].attention.beta[0] += 1e-6
    changed = model_sha256(model)
    assert changed != before
    model.config.segment_length = 16
    assert model_sha256(model) not in (before, changed)
