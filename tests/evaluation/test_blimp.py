"""BLiMP, against log-probabilities of one sentence at a time, and against lm-evaluation-harness."""

import json
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT, call_script
from torch.testing import assert_close

from infini_ds.data.batches import batches_by_length, pad_documents
from infini_ds.evaluation.evaluation_file import read_evaluation
from infini_ds.evaluation.minimal_pairs import Paradigm, read_paradigms
from infini_ds.evaluation.model_loading import load_evaluated_model
from infini_ds.evaluation.scoring import token_losses
from infini_ds.evaluation.tasks.blimp import compute_accuracy, sentence_ids
from infini_ds.utils.errors import UserError

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


@pytest.fixture(scope="module")
def babylm(pairs, tmp_path_factory):
    """BabyLM's evaluation data: categories with the paradigms in UID, a supplement, and GLUE beside them."""
    folder = tmp_path_factory.mktemp("babylm") / "filter_data"
    uids = {"agreement": ("verb_1", "verb_1", "verb_2"), "islands": ("wh_1", "wh_2", "wh_2")}
    for category, its_uids in uids.items():
        (good, bad), other = [pair[:2] for pair in pairs if pair[2] == category]
        rows = [(good, bad), (bad, good), other]
        lines = [
            {"UID": uid, "sentence_good": good, "sentence_bad": bad, "field": "syntax", "simple_LM_method": True}
            for uid, (good, bad) in zip(its_uids, rows, strict=True)
        ]
        lines[0]["sentence_good"] += " \u2028"  # a line separator, which JSON allows in a string
        write_lines(folder / "blimp_filtered" / f"{category}.json", lines)
    for name, (good, bad, _) in zip(("hypernym", "turn_taking"), pairs, strict=False):
        row = {"sentence_good": good, "sentence_bad": bad, "UID": "of the supplement", "linguistics_term": "x"}
        write_lines(folder / "supplement_filtered" / f"{name}.json", [row])
    write_lines(folder / "glue_filtered" / "cola.json", [{"sentence": "Glue.", "label": 1}])
    return folder


def write_lines(file, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")


def test_babylm_files_by_paradigm_by_category_and_supplement(babylm, exported, tmp_path, monkeypatch):
    """Each number against log-probabilities of one sentence at a time."""
    drawn = []
    monkeypatch.setattr("infini_ds.evaluation.tasks.blimp.save_figure", lambda figure, file: drawn.append(figure))
    done = call_script("launch/evaluate.py", exported, "--tasks", "blimp", "--blimp", babylm, "--out", tmp_path)
    found = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]["blimp"]
    model = load_evaluated_model(str(exported), CPU)

    def correct(row: dict) -> bool:
        good, bad = (sentence_ids(model.tokenizer, row[f"sentence_{kind}"]) for kind in ("good", "bad"))
        return log_likelihood(model.model, good) >= log_likelihood(model.model, bad)

    by_uid, by_file = {}, {}
    for file in sorted(babylm.glob("[bs]*/*.json")):
        for row in map(json.loads, file.read_text(encoding="utf-8").removesuffix("\n").split("\n")):
            by_file.setdefault(file.stem, []).append(correct(row))
            if file.parent.name == "blimp_filtered":
                by_uid.setdefault(row["UID"], []).append(by_file[file.stem][-1])
    means = {name: sum(each) / len(each) for name, each in (by_uid | by_file).items()}
    assert {uid: score["accuracy"] for uid, score in found["paradigms"].items()} == {uid: means[uid] for uid in by_uid}
    assert found["accuracy"] == sum(means[uid] for uid in by_uid) / 4
    assert found["phenomena"] == {
        "agreement": (means["verb_1"] + means["verb_2"]) / 2,
        "islands": (means["wh_1"] + means["wh_2"]) / 2,
    }
    assert found["categories"] == {name: {"accuracy": means[name], "pairs": 3} for name in ("agreement", "islands")}
    assert found["category_accuracy"] == (means["agreement"] + means["islands"]) / 2
    supplement = found["supplement"]
    assert {name: score["accuracy"] for name, score in supplement["paradigms"].items()} == {
        name: means[name] for name in ("hypernym", "turn_taking")
    }
    assert supplement["accuracy"] == (means["hypernym"] + means["turn_taking"]) / 2
    for words in ("agreement", "islands", "supplement: hypernym", "supplement: turn taking", "supplement: mean"):
        assert words in done.stdout, words
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert sorted(labels[:2]) == ["supplement: hypernym", "supplement: turn taking"], "below BLiMP's phenomena"
    assert sorted(labels[2:]) == ["agreement", "islands"]
    rows = {row.metric: row.value for row in read_evaluation(tmp_path).result("blimp").tidy_rows()}
    assert rows["supplement/hypernym"] == means["hypernym"] and rows["supplement"] == supplement["accuracy"]
    assert rows["category_accuracy"] == found["category_accuracy"] and rows["pairs"] == 6


def test_folders_of_folders_both_endings_and_links(babylm, sentences, tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "link").symlink_to(sentences)
    row = {"sentence_good": "a", "sentence_bad": "b"}
    write_lines(tmp_path / "data" / "capitals.JSONL", [row])
    (tmp_path / "data" / "list.json").write_text("\ufeff" + json.dumps([row, row]), encoding="utf-8")
    found = {paradigm.name: paradigm for paradigm in read_paradigms(str(tmp_path / "data"), 1)}
    assert set(found) == {"capitals", "list", "agreement_1", "islands_1"}
    assert found["agreement_1"].phenomenon == "agreement" and found["list"].pairs == [("a", "b")]
    (alone, *_) = read_paradigms(str(babylm / "supplement_filtered"), None)
    assert alone.supplement and alone.name == "hypernym"
    write_lines(tmp_path / "data" / "again" / "capitals.jsonl", [row])
    with pytest.raises(UserError, match=r"capitals is in .*capitals\.\w+ and in .*: name a folder that holds it once"):
        read_paradigms(str(tmp_path / "data"), None)


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
