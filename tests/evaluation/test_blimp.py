"""BLiMP, against log-probabilities of one sentence at a time, and against lm-evaluation-harness."""

import json
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT
from torch.testing import assert_close

from infini_ds.data.batches import pad_documents
from infini_ds.evaluation.model_loading import load_evaluated_model
from infini_ds.evaluation.scoring import batches_by_length, token_losses
from infini_ds.evaluation.tasks.blimp import Paradigm, compute_accuracy, read_paradigms, sentence_ids

CPU = torch.device("cpu")


def log_likelihood(model, ids: list[int]) -> float:
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_p[t, ids[t + 1]].item() for t in range(len(ids) - 1))


def test_accuracies_are_those_of_one_sentence_at_a_time(tasks, runs, pairs):
    found = tasks["blimp"]
    model = load_evaluated_model(str(runs / "one"), CPU)
    correct = {}
    for good, bad, phenomenon in pairs:
        scores = [
            log_likelihood(model.model, [0, *model.tokenizer(f" {sentence}")["input_ids"]]) for sentence in (good, bad)
        ]
        correct.setdefault(phenomenon, []).append(scores[0] >= scores[1])
    for phenomenon, each in correct.items():
        assert found["paradigms"][f"{phenomenon}_1"]["accuracy"] == sum(each) / len(each)
        assert found["paradigms"][f"{phenomenon}_1"]["pairs"] == 2
        assert found["phenomena"][phenomenon] == sum(each) / len(each)
    assert found["accuracy"] == sum(found["phenomena"].values()) / 2


def test_scores_do_not_depend_on_the_batch(exported, pairs):
    model = load_evaluated_model(str(exported), CPU)
    rows = [sentence_ids(model.tokenizer, sentence) for pair in pairs for sentence in pair[:2]]
    alone = torch.tensor([-log_likelihood(model.model, ids) for ids in rows])
    for batch_tokens in (1, 60, 10_000):
        batches = batches_by_length(list(map(len, rows)), batch_tokens)
        assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(len(rows[i]) for i in batch) <= batch_tokens
            together = token_losses(model.model, pad_documents([rows[i] for i in batch])).sum(1)
            assert_close(together, alone[batch], rtol=1e-5, atol=1e-4)


def test_a_tie_is_correct(exported):
    model = load_evaluated_model(str(exported), CPU)
    same = Paradigm("same", "none", [("One sentence.", "One sentence.")])
    assert compute_accuracy(model, same, 100).accuracy == 1


def test_the_start_token_is_added_once(exported):
    tokenizer = load_evaluated_model(str(exported), CPU).tokenizer
    assert sentence_ids(tokenizer, "a")[0] == tokenizer.bos_token_id
    with_start = SimpleNamespace(bos_token_id=None, eos_token_id=7, encode=lambda text, add_special_tokens: [7, 3])
    assert sentence_ids(with_start, "a") == [7, 3]


def test_blimp_equals_the_harness(exported, sentences, tmp_path, monkeypatch):
    """lm-evaluation-harness on the export, with a task that includes the shipped one."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    template = ROOT / "launch" / "lm_eval" / "blimp_local.yaml"
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
    model = load_evaluated_model(str(exported), CPU)
    for name in names:
        paradigm = next(p for p in read_paradigms(str(sentences), None) if p.name == name)
        assert theirs["results"][name]["acc,none"] == compute_accuracy(model, paradigm, 1000).accuracy
        for sample in theirs["samples"][name]:
            for sentence, response in zip(paradigm.pairs[sample["doc_id"]], sample["resps"], strict=True):
                ours = log_likelihood(model.model, sentence_ids(model.tokenizer, sentence))
                assert float(response[0][0]) == pytest.approx(ours, abs=1e-3)
