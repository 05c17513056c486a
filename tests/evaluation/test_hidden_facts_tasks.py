"""The tasks needle and babi: what an example is, what the result holds, and mistakes; and recall with --pairs."""

import json
from dataclasses import replace

import pytest
import torch
from harness import call_script, finish_ranks, start_ranks

from data_prep.synthetic.babi import read_babi
from data_prep.synthetic.haystack import Haystack, sentences
from data_prep.tokenizer import make_word_tokenizer
from infini_ds.evaluation.evaluation_file import read_evaluation
from infini_ds.evaluation.haystack_options import read_haystack
from infini_ds.evaluation.model_loading import load_evaluated_model
from infini_ds.evaluation.task import TASKS
from infini_ds.evaluation.tasks import babi as babi_task
from infini_ds.evaluation.tasks import needle as needle_task
from infini_ds.evaluation.tasks.recall import with_numbers_of_pairs
from infini_ds.utils.errors import UserError

PEOPLE, ROOMS = ("Mary", "John", "Sandra"), ("bathroom", "garden", "office")


@pytest.fixture(scope="module")
def model(exported):
    return load_evaluated_model(str(exported), torch.device("cpu"))


@pytest.fixture(scope="module")
def text(corpus):
    return (corpus / "argparse.txt").read_text()


@pytest.fixture(scope="module")
def haystack(model, text):
    return Haystack([model.tokenizer.encode(sentence, add_special_tokens=False) for sentence in sentences(text)])


@pytest.fixture(scope="module")
def babi_files(tmp_path_factory):
    """Tasks 1 and 2: short stories, and stories of 200 facts that fit into no short text."""
    folder = tmp_path_factory.mktemp("babi")
    lines = []
    for i in range(12):
        person, room = PEOPLE[i % 3], ROOMS[(i // 3 + i) % 3]
        lines += [f"1 {person} moved to the {room}.", f"2 Where is {person}? \t{room}\t1"]
    (folder / "qa1_test.txt").write_text("\n".join(lines) + "\n")
    lines = [f"{n} {PEOPLE[n % 3]} went to the {ROOMS[n % 3]}." for n in range(1, 201)]
    lines += ["201 Where is Mary? \tbathroom\t1", "202 Where is John? \tgarden\t1"]
    (folder / "qa2_test.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_a_needle_is_in_its_place_of_an_exact_text(model, haystack, depth):
    S, decode = model.model.config.segment_length, model.tokenizer.decode
    example = needle_task.make_example(model, haystack, 40 * S, depth, 3, 0, 5)
    assert len(example.text) == 40 * S and example.text[0] == model.tokenizer.bos_token_id
    key = decode(example.answer)
    needle = f" the pass key is{key} . remember it ."
    text = decode(example.text)
    assert text.count(needle) == 1 and len(key.split()) == 3
    assert decode(example.question) == " what is the pass key ? the pass key is"
    before = len(model.tokenizer.encode(text[: text.index(needle)], add_special_tokens=False))
    assert before / (40 * S) == pytest.approx(depth, abs=0.12)
    same = needle_task.make_example(model, haystack, 40 * S, 1 - depth, 3, 0, 5)
    assert same.answer == example.answer and sorted(same.text) == sorted(example.text), "only the depth differs"
    assert needle_task.make_example(model, haystack, 40 * S, depth, 3, 0, 6).text != example.text


def test_babi_facts_are_in_order_in_an_exact_text(model, haystack, babi_files):
    S, decode = model.model.config.segment_length, model.tokenizer.decode
    stories = read_babi(babi_files, "evaluation")
    (long,) = stories[2]
    question = babi_task.tokenize_question(model, long[0])
    assert babi_task.filler_tokens(model, question, 4 * S) < 0
    tokens = 200 * S
    example = babi_task.make_example(model, [question], haystack, tokens, 0, 0)
    assert len(example.text) == tokens and example.text[0] == model.tokenizer.bos_token_id
    text, at = decode(example.text), 0
    for fact in long[0].facts:
        at = text.index(f" {fact}", at) + len(fact)
    assert decode(example.question) == " Where is Mary?" and decode(example.answer) == " bathroom"
    alone = babi_task.make_example(model, [question], haystack, 0, 0, 0)
    everything = [*long[0].facts, "Where is Mary?"]
    assert alone.text == [] and decode(alone.question[1:]) == "".join(f" {sentence}" for sentence in everything)


@pytest.fixture(scope="module")
def measured(exported, corpus, babi_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("hidden")
    options = ["--haystack", f"text:{corpus}", "--babi", babi_files, "--babi-tasks", "1", "2", "--out", out]
    options += ["--needle-segments", "2", "5", "--needle-depths", "0", "100", "--needle-examples", "3"]
    options += ["--babi-segments", "0", "3", "--babi-examples", "4"]
    done = call_script("launch/evaluate.py", exported, "--tasks", "needle", "babi", *options)
    return out, json.loads((out / "evaluation.json").read_text())["tasks"], done.stdout, options


def test_results_tables_and_plots(measured):
    out, found, shown, _ = measured
    needle = found["needle"]["tasks"]["needle"]
    assert [(p["segments"], p["depth"]) for p in needle["points"]] == [(2, 0.0), (2, 1.0), (5, 0.0), (5, 1.0)]
    for point in needle["points"]:
        assert set(point["accuracy"]) == {"on", "off", "other"} and point["answers"] == 3
        assert point["tokens"] > point["segments"] * found["needle"]["segment_length"]
    assert needle["chance"] == 1e-5 and "memory on, by depth of the pass key" in shown
    qa1, qa2 = (found["babi"]["tasks"][name] for name in ("qa1", "qa2"))
    assert [(p["segments"], p["answers"]) for p in qa1["points"]] == [(0, 4), (3, 4)]
    assert [(p["segments"], p["answers"]) for p in qa2["points"]] == [(0, 2)], "the stories of 200 facts fit nowhere"
    assert qa1["chance"] == pytest.approx(6 / 12) and qa2["chance"] == 1
    assert "most frequent answer" in shown and "no story of task 2 fits into 3 segments of 32 tokens" in shown
    for task in ("needle", "babi"):
        assert (out / f"{task}.png").read_bytes().startswith(b"\x89PNG")
        assert len(found[task]["data"]["sha256"]) == 64
        result = read_evaluation(out).result(task)
        rows = {row[:2]: row.value for row in result.tidy_rows()}
        headline = TASKS[task].headline(result)
        assert rows["on", headline.name] == headline.value
    assert ("off", "accuracy/qa1/3_segments/depth_0") in rows


def test_finished_points_are_not_computed_again(measured, exported, monkeypatch):
    out, found, _, options = measured

    def fail(*arguments):
        raise AssertionError("a point was computed again")

    for module in (needle_task, babi_task):
        monkeypatch.setattr(module, "score_streamed", fail)
    call_script("launch/evaluate.py", exported, "--tasks", "needle", "babi", *options)
    again = json.loads((out / "evaluation.json").read_text())["tasks"]
    assert again["needle"]["tasks"] == found["needle"]["tasks"] and again["babi"]["tasks"] == found["babi"]["tasks"]


def test_an_external_model_reads_what_fits(gpt2, corpus, tmp_path):
    options = ["--haystack", f"text:{corpus}", "--needle-segments", "1", "--needle-examples", "2", "--out", tmp_path]
    done = call_script("launch/evaluate.py", gpt2, "--tasks", "needle", *options)
    found = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]["needle"]
    assert found["segment_length"] == 128 and list(found["tasks"]["needle"]["points"][0]["accuracy"]) == ["on"]
    assert "memory off" not in done.stdout


def test_mistakes_are_one_sentence(exported, corpus, babi_files, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    needle, babi = ("--tasks", "needle"), ("--tasks", "babi")
    for arguments, sentence in {
        (*needle, "--haystack", str(corpus)): f"--haystack {corpus}: say what it is; write it as text:{corpus}",
        (*needle, "--haystack", f"text:{tmp_path}/none"): "no such folder",
        (*needle, "--haystack", f"text:{tmp_path}/empty"): "holds no text: name another source",
        (*needle, "--needle-segments", "1", "--needle-digits", "40"): "--needle-segments 1: the pass key has",
        (*needle, "--needle-depths", "101"): "--needle-depths 101 must be at most 100",
        (*needle, "--needle-examples", "1"): "--needle-examples 1 must be at least 2",
        babi: "--tasks babi needs --babi PATH: the folder or archive of bAbI's files",
        (*babi, "--babi", str(tmp_path)): f"--babi {tmp_path}: no files qa1.txt, qa2.txt, … of the evaluation split",
        (*babi, "--babi", f"{tmp_path}/x.tar"): f"--babi {tmp_path}/x.tar: no folder and no tar archive of bAbI",
        (*babi, "--babi", str(babi_files), "--babi-tasks", "7"): "has no file of it, but of 1, 2",
        (*babi, "--babi", str(babi_files), "--babi-tasks", "2", "--babi-segments", "1"): "no story fits into segments",
        ("--tasks", "recall", "--pairs", "4", "--recall", "passkey"): "--pairs 4: no task of --recall has pairs",
        ("--tasks", "recall", "--pairs", "65"): "--pairs 65: there are 64 keys; give at most so many pairs",
    }.items():
        error = call_script("launch/evaluate.py", exported, *arguments, "--out", tmp_path / "out", code=2).stderr
        assert sentence in error and error.startswith("error: ") and error.count("\n") == 1, error


def test_a_word_tokenizer_that_does_not_know_the_text_is_refused(model, corpus):
    of_words = replace(model, tokenizer=make_word_tokenizer(["apple", "ball"]))
    with pytest.raises(UserError, match="does not know most of its words: name text of the kind that the model"):
        read_haystack(of_words, f"text:{corpus}", 100)


def test_numbers_of_pairs_replace_those_of_pairs_tasks():
    assert with_numbers_of_pairs(["passkey", "pairs,queries=4"], [64, 4]) == [
        "passkey",
        "pairs,queries=4,pairs=4",
        "pairs,queries=4,pairs=64,keys=64",
    ]
    assert with_numbers_of_pairs(["pairs,pairs=8,keys=40"], [16, 48]) == [
        "pairs,pairs=16,keys=40",
        "pairs,pairs=48,keys=48",
    ]
    assert with_numbers_of_pairs(["pairs,pairs=8"], []) == ["pairs,pairs=8"]
    with pytest.raises(UserError, match="there are 64 keys"):
        with_numbers_of_pairs(["pairs"], [65])


def test_recall_by_pairs(exported, tmp_path):
    options = ["--recall", "pairs,queries=2", "--pairs", "2", "40", "--segments", "0", "1", "--examples", "2"]
    call_script("launch/evaluate.py", exported, "--tasks", "recall", *options, "--out", tmp_path)
    found = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]["recall"]["tasks"]
    assert list(found) == ["pairs,queries=2,pairs=2", "pairs,queries=2,pairs=40,keys=40"]
    assert (tmp_path / "recall_by_pairs.png").read_bytes().startswith(b"\x89PNG")
    options = ["--recall", "pairs", "--segments", "0", "--examples", "2", "--out", tmp_path / "b"]
    call_script("launch/evaluate.py", exported, "--tasks", "recall", *options)
    assert not (tmp_path / "b" / "recall_by_pairs.png").exists(), "there is one number of pairs"


@pytest.mark.timeout(240)
def test_two_ranks_and_other_batch_sizes_give_the_same(measured, exported, tmp_path):
    _, one, _, options = measured
    given = [str(x) for x in options if x != options[options.index("--out") + 1] and x != "--out"]
    command = [str(exported), "--tasks", "needle", "babi", *given, "--out", str(tmp_path), "--batch-tokens", "300"]
    finish_ranks(start_ranks(2, *command, script="launch/evaluate.py"))
    two = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]
    assert two["needle"]["tasks"] == one["needle"]["tasks"] and two["babi"]["tasks"] == one["babi"]["tasks"]
