"""launch/evaluate.py and its tasks, against plain computations row by row, other batches, other ranks, the harness."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import call_script, start_ranks
from reference import random_ids, tiny_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from infini_ds.config.training_data import find_sources
from infini_ds.conversion.export import export
from infini_ds.conversion.locate import load_tokenizer, locate
from infini_ds.data.batches import collate, pad_documents
from infini_ds.data.streams import ValidationRows
from infini_ds.evaluation import blimp, position, recall
from infini_ds.evaluation.model_loading import load, model_sha256
from infini_ds.evaluation.result_cache import ResultCache
from infini_ds.evaluation.scoring import answered, batches_by_length, token_losses
from infini_ds.model import BlockSchedule
from infini_ds.training.validation import position_losses
from infini_ds.utils.errors import UserError

CPU = torch.device("cpu")
PAIRS = [
    ("The module reads a file.", "The module read a files.", "agreement"),
    ("It returns the first of them, if there are any.", "It return the first of them, if there is any.", "agreement"),
    ("Who should they import after reading this?", "Who should they import this after reading?", "islands"),
    ("What does it raise?", "What does raises it?", "islands"),
]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    """Two paradigms in BLiMP's form."""
    folder = tmp_path_factory.mktemp("blimp")
    for term in ("agreement", "islands"):
        lines = [
            json.dumps({"sentence_good": good, "sentence_bad": bad, "linguistics_term": term})
            for good, bad, of in PAIRS
            if of == term
        ]
        (folder / f"{term}_1.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(locate(runs / "one"), folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(runs, tmp_path_factory) -> Path:
    """A GPT-2 of random weights that takes 24 tokens, with the tokenizer of the shards."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    load_tokenizer(locate(runs / "one")).save_pretrained(folder)
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


TASKS = ["--tasks", "position", "recall", "blimp", "--rows", "5"]
RECALL = ["--recall", "pairs,queries=2", "passkey,digits=2", "--segments", "0", "2", "--examples", "3"]


@pytest.fixture(scope="module")
def evaluated(runs, sentences, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "one"
    call_script("launch/evaluate.py", runs / "one", *TASKS, *RECALL, "--blimp", sentences, "--out", out)
    return out


# ---- the command


def test_every_result_names_what_it_is_of(evaluated, exported):
    found = read(evaluated)
    assert found["model"]["model_type"] == "infini_gpt_neo"
    assert found["model"]["sha256"] == load(str(exported), CPU).sha256, "a checkpoint and its export are one model"
    assert found["command"].startswith("python") and "--segments 0 2" in found["command"]
    assert set(found["tasks"]) == {"position", "recall", "blimp"}
    for result in found["tasks"].values():
        assert len(result["data"]["sha256"]) == 64 and result["data"]["path"]
        assert result["command"] == found["command"] and result["seed"] == found["seed"] == 0
    for task in found["tasks"]:
        assert (evaluated / f"{task}.png").stat().st_size > 10_000


def test_what_is_finished_is_passed_over_and_other_tasks_stay(evaluated, runs, sentences, tmp_path):
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
    assert set(other["tasks"]) == {"blimp"}, "results of another model are not mixed in"
    assert other["tasks"]["blimp"]["paradigms"]["islands_1"]["accuracy"] in (0, 0.5, 1)


@pytest.mark.timeout(240)
def test_two_ranks_and_other_batches_find_the_same(evaluated, runs, sentences, tmp_path):
    arguments = [runs / "one", *TASKS, *RECALL, "--blimp", sentences, "--out", tmp_path, "--batch-tokens", "700"]
    processes = start_ranks(2, *map(str, arguments), script="launch/evaluate.py")
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert outputs[1] == ""
    one, two = read(evaluated)["tasks"], read(tmp_path)["tasks"]
    assert two["recall"]["tasks"] == one["recall"]["tasks"]
    assert two["blimp"]["paradigms"] == one["blimp"]["paradigms"]
    for memory in ("on", "off", "other"):
        ours, theirs = (each["position"]["memory"][memory] for each in (one, two))
        for key in ("loss", "by_row"):
            assert_close(torch.tensor(ours[key]), torch.tensor(theirs[key]), rtol=0, atol=1e-5)
        assert_close(torch.tensor(ours["by_segment"]["loss"]), torch.tensor(theirs["by_segment"]["loss"]))


def test_a_foreign_model_is_a_baseline(gpt2, shards, sentences, tmp_path):
    options = ["--data", shards, "--rows", "2", "--blimp", sentences, *RECALL[:2], "--segments", "1", "--examples", "2"]
    done = call_script("launch/evaluate.py", gpt2, *TASKS[:4], *options, "--out", tmp_path)
    found = read(tmp_path)
    assert found["model"]["model_type"] == "gpt2" and list(found["tasks"]["position"]["memory"]) == ["on"]
    assert found["tasks"]["position"]["gained"] == {} and "memory off" not in done.stdout


def test_mistakes_are_one_sentence(runs, exported, gpt2, shards, sentences, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.jsonl").write_text('{"text": "no pair"}\n')
    cases = {
        (runs / "one", "--tasks", "positon"): "--tasks positon is not one of position, recall, blimp, glue",
        (runs / "one", "--rows", "-1"): "--rows -1 must be at least 0",
        (runs / "one", "--segments", "1", "-2"): "--segments [1, -2] must be at least 0",
        (tmp_path / "none",): "there is no such folder",
        ("no-such/model",): "no-such/model: there is no such folder, nor on the hub",
        (tmp_path,): "is neither an exported folder",
        (exported, "--tasks", "position"): "name a folder of data_prep with --data",
        (exported, "--data", tmp_path): "is no finished folder of prepared data",
        (exported, "--tasks", "blimp", "--blimp", tmp_path): "holds no .jsonl files",
        (exported, "--tasks", "blimp", "--blimp", empty): "each line is JSON with sentence_good and sentence_bad",
        (exported, "--tasks", "blimp"): "nyu-mll/blimp: there is no such folder, and the hub gave none",
        (exported, "--tasks", "recall", "--recall", "pears"): "did you mean pairs?",
        (exported, "--tasks", "blimp", "--blimp", sentences, "--out", "/proc/x"): "name another folder, with --out",
    }
    for arguments, sentence in cases.items():
        error = call_script("launch/evaluate.py", *arguments, code=2).stderr
        assert sentence in error and error.startswith("error: ") and error.count("\n") == 1, error


def test_rows_of_another_tokenizer_are_refused(exported, shards, tmp_path):
    subject = load(str(exported), CPU)
    subject.tokenizer.add_tokens(["newword"])
    with pytest.raises(UserError, match="another tokenizer"):
        vocabulary = dict(subject.tokenizer.get_vocab())
        vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
        subject.tokenizer.get_vocab = lambda: vocabulary
        position.measure(subject, find_sources(str(shards), [], ""), 1, ResultCache(tmp_path, "", 1))


def test_the_hash_is_of_what_the_model_computes(exported):
    model = load(str(exported), CPU).model
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


# ---- loss by position


def test_loss_by_position_is_that_of_validation(evaluated, runs, shards):
    found = read(evaluated)["tasks"]["position"]
    rows = ValidationRows(find_sources(str(shards), [], ""))
    chosen = [rows[i * len(rows) // 5] for i in range(5)]
    model = load(str(runs / "one"), CPU).model
    S = found["segment_length"]
    for memory, use_memory in (("on", True), ("off", False)):
        losses, labels = [], []
        for row in chosen:
            batch = collate([row])
            (inputs,) = batch.micro_batches(1, CPU)
            losses.append(model(**inputs, use_memory=use_memory, loss_reduction="none").loss[0].detach())
            labels.append(batch.labels[0, 1:] != -100)
        losses, counted = torch.stack(losses).double(), torch.stack(labels)
        measured = found["memory"][memory]
        assert measured["loss"] == pytest.approx((losses.sum() / counted.sum()).item(), abs=1e-5)
        assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))
        third = slice(2 * S, 3 * S)
        mean = losses[:, third].sum() / counted[:, third].sum()
        assert measured["by_segment"]["loss"][2] == pytest.approx(mean.item(), abs=1e-5)
        places = losses[:, S + 4 :: S].sum() / counted[:, S + 4 :: S].sum()
        assert measured["within_segment"]["loss"][4] == pytest.approx(places.item(), abs=1e-5)
        assert measured["by_row"] == pytest.approx((losses.sum(1) / counted.sum(1)).tolist(), abs=1e-5)
    gained = torch.tensor(found["memory"]["off"]["by_row"]) - torch.tensor(found["memory"]["on"]["by_row"])
    assert found["gained"]["off"]["mean"] == pytest.approx(gained.mean().item(), abs=1e-6)


def test_whole_split_is_what_training_validates_on(runs, shards, tmp_path):
    sources = find_sources(str(shards), [], "")
    subject = load(str(runs / "one"), CPU)
    found = position.measure(subject, sources, None, ResultCache(tmp_path, "", 2048))
    expected = position_losses(subject.model, ValidationRows(sources), None, 8)
    assert found["memory"]["on"]["loss"] == pytest.approx(expected.mean, abs=1e-5)
    assert found["memory"]["on"]["tokens"] == int(expected.count.sum())


def test_memory_of_another_document_is_the_models_memory_of():
    """And rows with padding and documents of their own."""
    model = tiny_model(3, torch.float32)
    ids, others = random_ids(2, 21, 1), random_ids(2, 21, 2)
    mine = pad_documents([ids[0].tolist(), ids[1, :13].tolist()])
    theirs = pad_documents([others[0, :17].tolist(), others[1].tolist()])
    theirs = replace(theirs, document_ids=torch.zeros_like(theirs.input_ids))
    theirs.document_ids[0, 9:] = 1
    losses = token_losses(model, mine, "other", theirs)
    for row in range(2):
        (pair,) = (mine[row : row + 1] + theirs[row : row + 1]).micro_batches(2, CPU)
        alone = model(**pair, memory_of=torch.tensor([1, 1]), loss_reduction="none").loss[0]
        assert_close(losses[row], alone)
    assert not torch.allclose(losses, token_losses(model, mine))


def test_documents_of_rows_and_partners_that_share_none(shards):
    rows = ValidationRows(find_sources(str(shards), [], ""))
    number, expected = -1, []
    for i in range(len(rows)):  # one source: the order of the split
        row, first = rows[i], None
        at = 0
        for length in row["document_lengths"]:
            if at or row["input_ids"][0] == 0 or number < 0:
                number += 1
            first = number if first is None else first
            at += length
        expected.append((first, number))
    documents = rows.documents(0)
    assert documents == expected and documents[-1][1] > 3
    others = position._rows_of_others(list(range(len(rows))), documents)
    for row, other in enumerate(others):
        (a, b), (c, d) = documents[row], documents[other]
        assert not set(range(a, b + 1)) & set(range(c, d + 1))
    assert position._rows_of_others([0, 1], [(0, 0), (0, 2), (2, 2)]) is None


def test_a_foreign_model_sees_each_document_in_windows(gpt2):
    model = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    ids = torch.randint(1, 512, (2, 61), generator=torch.Generator().manual_seed(0))
    batch = pad_documents([ids[0].tolist(), ids[1, :40].tolist()])
    batch = replace(batch, document_ids=torch.zeros_like(batch.input_ids))
    batch.document_ids[0, 30:] = 1
    losses = token_losses(model, batch)
    windows = {0: [(0, 24), (24, 30), (30, 54), (54, 61)], 1: [(0, 24), (24, 40)]}
    for row, pieces in windows.items():
        length = int(batch.full_attention_mask()[row].sum())
        for first, last in pieces:
            with torch.no_grad():
                log_p = model(ids[row : row + 1, first:last]).logits[0].log_softmax(-1)
            for t in range(first, min(last, length - 1)):
                assert losses[row, t].item() == pytest.approx(-log_p[t - first, ids[row, t + 1]].item(), abs=1e-5)
    assert (losses[1, 39:] == 0).all()


# ---- recall


def test_answered_is_what_greedy_decoding_gives(gpt2):
    """Answers of which some are what the model generates by itself, in rows of different lengths."""
    tiny, foreign = tiny_model(4, torch.float32), AutoModelForCausalLM.from_pretrained(gpt2).eval()
    for model, T in ((tiny, 30), (foreign, 12)):
        rows, answers, expected = [], [], []
        for seed in range(6):
            prompt = random_ids(1, T - seed, seed)
            said = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)[0]
            ids = said.tolist()
            wrong = seed % 3  # of the three tokens the one that is changed, if any
            if wrong:
                ids[T - seed + wrong] = ids[T - seed + wrong] % 18 + 1
            rows.append(ids)
            answers.append([(T - seed, T - seed + 1), (T - seed, T - seed + 3)])
            expected.append([True, not wrong])
        assert answered(model, pad_documents(rows), answers) == expected


def test_recall_counts_segments_between_fact_and_question(exported):
    subject = load(str(exported), CPU)
    S = subject.model.config.segment_length

    def tokenize(text: str) -> list[int]:
        return subject.tokenizer.encode(text, add_special_tokens=False)

    points = list(recall.points_of("passkey", [0, 2, 8], S))
    assert [(p.segments, p.depth) for p in points[:3]] == [(0, 0.0), (2, 0.0), (2, 0.25)] and len(points) == 11
    for point in points + list(recall.points_of("pairs,queries=3", [4], S)):
        example = point.task.example(0, 0, tokenize)
        distance = round((1 - point.depth) * point.segments * S)
        if point.name == "passkey":
            assert example.answers[0].distance == distance
        else:
            assert min(answer.distance for answer in example.answers) >= distance


def test_recall_names_its_answers_settings_and_chance(evaluated):
    found = read(evaluated)["tasks"]["recall"]
    assert found["tasks"]["pairs,queries=2"]["chance"] == 1 / 32
    assert [point["answers"] for point in found["tasks"]["pairs,queries=2"]["points"]] == [6, 6]
    for point in found["tasks"]["passkey,digits=2"]["points"]:
        assert set(point["accuracy"]) == {"on", "off", "other"} and point["answers"] == 3


# ---- BLiMP


def log_likelihood(model, ids: list[int]) -> float:
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_p[t, ids[t + 1]].item() for t in range(len(ids) - 1))


def test_blimp_is_the_sentences_one_by_one(evaluated, runs):
    found = read(evaluated)["tasks"]["blimp"]
    subject = load(str(runs / "one"), CPU)
    right = {}
    for good, bad, term in PAIRS:
        scores = [
            log_likelihood(subject.model, [0, *subject.tokenizer(f" {sentence}")["input_ids"]])
            for sentence in (good, bad)
        ]
        right.setdefault(term, []).append(scores[0] >= scores[1])
    for term, each in right.items():
        assert found["paradigms"][f"{term}_1"]["accuracy"] == sum(each) / len(each)
        assert found["paradigms"][f"{term}_1"]["pairs"] == 2
        assert found["phenomena"][term] == sum(each) / len(each)
    assert found["accuracy"] == sum(found["phenomena"].values()) / 2


def test_scores_of_sentences_depend_on_no_batch(exported, sentences):
    subject = load(str(exported), CPU)
    rows = [blimp.sentence_ids(subject.tokenizer, text) for pair in PAIRS for text in pair[:2]]
    alone = torch.tensor([-log_likelihood(subject.model, ids) for ids in rows])
    for tokens in (1, 60, 10_000):
        batches = batches_by_length(list(map(len, rows)), tokens)
        assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(len(rows[i]) for i in batch) <= tokens
            together = token_losses(subject.model, pad_documents([rows[i] for i in batch])).sum(1)
            assert_close(together, alone[batch], rtol=1e-5, atol=1e-4)


def test_equal_scores_count_as_right(exported):
    subject = load(str(exported), CPU)
    same = blimp.Paradigm("same", "none", [("One sentence.", "One sentence.")])
    assert blimp.accuracy(subject, same, 100) == 1


def test_the_start_token_is_not_put_twice(exported):
    tokenizer = load(str(exported), CPU).tokenizer
    assert blimp.sentence_ids(tokenizer, "a")[0] == tokenizer.bos_token_id
    started = SimpleNamespace(bos_token_id=None, eos_token_id=7, encode=lambda text, add_special_tokens: [7, 3])
    assert blimp.sentence_ids(started, "a") == [7, 3]


def test_blimp_equals_the_harness(exported, sentences, tmp_path, monkeypatch):
    """lm-evaluation-harness on the export, by a task of the shipped form."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    template = Path(__file__).resolve().parents[1] / "launch" / "lm_eval" / "blimp_local.yaml"
    for file in sentences.glob("*.jsonl"):
        own = {"include": str(template), "task": file.stem, "dataset_kwargs": {"data_files": {"train": str(file)}}}
        (tmp_path / f"{file.stem}.yaml").write_text(json.dumps(own))
    names = [file.stem for file in sentences.glob("*.jsonl")]
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={exported},trust_remote_code=True",
        tasks=names,
        task_manager=TaskManager(include_path=str(tmp_path)),
        batch_size=3,
        device="cpu",
        log_samples=True,
    )
    subject = load(str(exported), CPU)
    for name in names:
        paradigm = next(p for p in blimp.read_paradigms(str(sentences), None) if p.name == name)
        assert theirs["results"][name]["acc,none"] == blimp.accuracy(subject, paradigm, 1000)
        for sample in theirs["samples"][name]:
            for sentence, response in zip(paradigm.pairs[sample["doc_id"]], sample["resps"], strict=True):
                ours = log_likelihood(subject.model, blimp.sentence_ids(subject.tokenizer, sentence))
                assert float(response[0][0]) == pytest.approx(ours, abs=1e-3)
