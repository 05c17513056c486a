"""The glue task: fine-tuning on small tasks in the format of GLUE, its texts, its metrics, mistakes in its data."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import call_script
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from infini_ds.conversion.export import write_folder
from infini_ds.distributed import environment
from infini_ds.evaluation.evaluation_file import read_evaluation
from infini_ds.evaluation.finetuning import (
    BestEvaluation,
    FineTuning,
    classifier_of,
    finetune,
    metrics,
    parse_settings,
    predict,
    train_step,
)
from infini_ds.evaluation.glue_texts import evenly_spaced, load_split, split_of, tokenize, truncate
from infini_ds.evaluation.task import TidyRow
from infini_ds.evaluation.tasks.glue import GLUE_TASKS
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.utils.progress import ProgressBar

FILLER = [f"w{i}" for i in range(20)]
S = 8  # tokens in a segment


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word."""
    words = ["<start>", "<pad>", "no", "yes", *FILLER]
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<start>", eos_token="<start>", pad_token="<pad>", unk_token="<pad>"
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two tasks in the pipeline's format: in sst2 the answer is a word of the text, in boolq it is the question, which
    is at least a segment before the end of the passage.
    """
    folder, draw = tmp_path_factory.mktemp("glue"), random.Random(0)

    def sst2(answer: bool) -> dict:
        words = draw.choices(FILLER, k=draw.randint(3, 12))
        words[draw.randrange(len(words))] = "yes" if answer else "no"
        return {"sentence": " ".join(words)}

    def boolq(answer: bool) -> dict:
        passage = draw.choices(FILLER, k=draw.randint(2 * S, 3 * S))
        return {"question": " ".join(["yes" if answer else "no"] * 3), "passage": " ".join(passage)}

    for make in (sst2, boolq):
        for split, number in (("train", 256), ("validation", 100)):
            answers = [draw.random() < 0.5 for _ in range(number)]
            lines = [
                json.dumps(make(answer) | {"label": int(answer), "idx": idx}) for idx, answer in enumerate(answers)
            ]
            (folder / f"{make.__name__}.{split}.json").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory) -> Path:
    """A model with random weights, as an export."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]}
    ids = {"vocab_size": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = InfiniGPTNeoConfig(**shape, **ids, segment_length=S, max_position_embeddings=S)
    folder = tmp_path_factory.mktemp("exported")
    tokenizer.save_pretrained(folder / "tokenizer")
    write_folder(InfiniGPTNeoForCausalLM(config), folder / "tokenizer", folder / "model", "card")
    return folder / "model"


SETTINGS = FineTuning(learning_rate=3e-3, batch=32, epochs=10, evaluate_every=8, patience=3)


def examples(files: Path, name: str, tokenizer):
    splits = [load_split(str(files), "", name, split) for split in ("train", "validation")]
    return [tokenize(split, [0, 1], tokenizer, SETTINGS.max_length) for split in splits]


def test_only_the_memory_answers_a_question_of_an_early_segment(files, exported, tokenizer):
    train, validation = examples(files, "boolq", tokenizer)
    torch.manual_seed(0)
    model = classifier_of(InfiniGPTNeoForCausalLM.from_pretrained(exported), 2)
    best = finetune(model, train, validation, SETTINGS, 0, 16_384, ProgressBar("", 0, shown=False))
    assert best.metrics["accuracy"] > 0.95
    ids = [torch.tensor(row) for row in validation.rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    with torch.no_grad():
        without = model(pad_sequence(ids, batch_first=True), attention_mask=mask, use_memory=False).logits.argmax(-1)
    assert (predict(model, validation.rows, 16_384) == validation.labels).double().mean() > 0.95
    assert 0.3 < (without == validation.labels).double().mean() < 0.7


def test_evaluate_fine_tunes_reports_and_skips_finished_tasks(files, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "set_cpu_threads", lambda process: None)  # two threads are slower at this size
    keys = [f"{name}={getattr(SETTINGS, name)}" for name in ("learning_rate", "batch", "epochs", "evaluate_every")]
    arguments = ["launch/evaluate.py", exported, "--tasks", "glue", "--glue", files, "--out", tmp_path]
    first = call_script(*arguments, "--glue-tasks", "sst2", "--finetune", *keys, "patience=3")
    task = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]["glue"]["tasks"]["sst2"]
    assert task["metric"] == "accuracy" and task["value"] == task["accuracy"] > 0.9 > 0.7 > task["majority"]
    assert (task["train"], task["validation"], task["classes"]) == (256, 100, 2) and task["step"] % 8 == 0
    assert "sst2" in first.stdout and f"{task['value']:.3f}" in first.stdout
    assert (tmp_path / "glue.png").stat().st_size > 10_000
    result = read_evaluation(tmp_path).result("glue")
    assert result.tasks["sst2"].f1 == task["f1"] and result.settings == SETTINGS
    assert TidyRow("on", "accuracy/sst2", task["value"]) in result.tidy_rows()

    # With micro-batches of another size the scores are the same, but for an example that rounding decides on the way to
    # the best one, so that its step may differ; boolq is new; sst2 is not computed again.
    def scores(tasks):
        return {name: {key: value for key, value in of.items() if key != "step"} for name, of in tasks.items()}

    parts = tmp_path / "parts.json"
    both = [*arguments, "--glue-tasks", "sst2", "boolq", "--finetune", *keys, "patience=3"]
    call_script(*both, "--out", tmp_path / "small", "--batch-tokens", "400")
    small = json.loads((tmp_path / "small" / "evaluation.json").read_text())["tasks"]["glue"]
    assert scores(small["tasks"])["sst2"] == scores({"sst2": task})["sst2"]
    call_script(*both)
    kept = parts.read_text()
    again = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]["glue"]
    assert scores(again["tasks"]) == scores(small["tasks"]) and again["data"] == small["data"]
    assert again["tasks"]["sst2"] == task
    assert again["mean"] == (task["value"] + again["tasks"]["boolq"]["value"]) / 2
    assert again["tasks"]["boolq"]["value"] > 0.95
    assert len(json.loads(kept)) == 2
    call_script(*both)
    assert parts.read_text() == kept
    call_script(*both, "--seed", "1", "--limit", "64")
    assert len(json.loads(parts.read_text())) == 4


def test_training_does_not_depend_on_micro_batches(files, exported, tokenizer):
    train, _ = examples(files, "sst2", tokenizer)
    gradients = []
    for batch_tokens in (16_384, 60, 1):
        torch.manual_seed(0)
        model = classifier_of(InfiniGPTNeoForCausalLM.from_pretrained(exported).double(), 2)
        loss = train_step(model, train, list(range(9)), batch_tokens)
        gradients.append([loss, [p.grad for p in model.parameters()]])
    rows = [torch.tensor(row) for row in train.rows[:9]]
    with torch.no_grad():
        logits = torch.cat([model(row[None]).logits for row in rows])
    assert gradients[0][0] == pytest.approx(F.cross_entropy(logits, train.labels[:9]).item())
    for other in gradients[1:]:
        assert_close(other, gradients[0], rtol=1e-6, atol=1e-9)


def test_patience_and_the_best_evaluation(files, exported, tokenizer):
    """With a learning rate that changes nothing, all evaluations give the same."""
    train, validation = examples(files, "sst2", tokenizer)
    model = classifier_of(InfiniGPTNeoForCausalLM.from_pretrained(exported), 2)
    want = metrics(predict(model, validation.rows, 999), validation.labels, 2)
    for steps, settings in (
        (8 * 4, FineTuning(1e-12, batch=32, evaluate_every=8, patience=3)),  # the first, and three more
        (8 * 10, FineTuning(1e-12, batch=32, epochs=10, evaluate_every=8, patience=10)),  # ten epochs of 8 steps
    ):
        progress = ProgressBar("", 0, shown=False)
        assert finetune(model, train, validation, settings, 0, 9999, progress) == BestEvaluation(want, 8)
        assert progress.done == steps
    late = FineTuning(1e-12, batch=100, epochs=1, evaluate_every=200)  # no evaluation before the last step
    assert finetune(model, train, validation, late, 0, 9999, ProgressBar("", 0, shown=False)) == BestEvaluation(want, 3)


def test_an_external_model_is_fine_tuned_as_well(files, tokenizer):
    """It finds the last token by the id of padding, so its rows have to be padded with that id."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=24, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    classifier = classifier_of(model, 2)
    assert_close(classifier.transformer.state_dict(), model.transformer.state_dict())
    train, validation = examples(files, "sst2", tokenizer)
    alone = torch.cat([predict(classifier, [row], 999) for row in validation.rows])
    assert torch.equal(predict(classifier, validation.rows, 999), alone)
    settings = FineTuning(learning_rate=5e-3, batch=32, epochs=6, evaluate_every=8)
    assert (
        finetune(classifier, train, validation, settings, 0, 9999, ProgressBar("", 0, shown=False)).metrics["accuracy"]
        > 0.9
    )


@pytest.mark.parametrize(
    ("labels", "predictions", "want"),  # accuracy, F1 and Matthews, by hand
    [
        ([1, 1, 1, 0, 0, 1], [1, 0, 1, 1, 0, 1], (4 / 6, 0.75, 0.25)),
        ([1, 0, 1, 0], [1, 1, 1, 1], (0.5, 2 / 3, 0.0)),
        ([1, 0], [0, 0], (0.5, 0.0, 0.0)),
    ],
)
def test_metrics(labels, predictions, want):
    assert metrics(torch.tensor(predictions), torch.tensor(labels), 2) == pytest.approx(
        dict(zip(("accuracy", "f1", "mcc"), want, strict=True))
    )
    assert metrics(torch.tensor(predictions), torch.tensor(labels), 3) == {"accuracy": pytest.approx(want[0])}


def test_texts_of_each_task():
    """The columns that the files of the pipeline have, and idx, which is not part of the text."""
    for columns, want in (
        ("sentence", ("sentence",)),
        ("sentence1 sentence2", ("sentence1", "sentence2")),
        ("question1 question2", ("question1", "question2")),
        ("premise hypothesis", ("premise", "hypothesis")),
        ("question passage", ("question", "passage")),
        ("question sentence", ("question", "sentence")),
        ("paragraph question answer", ("Question: question Answer: answer", "paragraph")),
        (
            "text span1_index span2_index span1_text span2_text",
            ('Does "span2_text" refer to "span1_text" in this passage?', "text"),
        ),
    ):
        row = {name: name for name in columns.split()} | {"label": 0, "idx": {"a": 1}}
        assert split_of("", [row]).texts == [want]
    braces = split_of("", [{"sentence": "{a} {", "label": 1}])
    assert braces.texts == [("{a} {",)] and braces.labels == [1]


def test_pairs_are_truncated(tokenizer):
    a, b = list(range(10)), list(range(100, 106))
    for room, lengths in ((20, (10, 6)), (16, (10, 6)), (15, (9, 6)), (12, (6, 6)), (11, (6, 5)), (4, (2, 2))):
        assert truncate((a, b), room) == [a[: lengths[0]], b[: lengths[1]]]
        assert truncate((b, a), room)[0] == b[: room - min(10, room - min(6, -(-room // 2)))]
    assert truncate((a,), 4) == [a[:4]]
    split = split_of("", [{"question": "yes w0 w1", "passage": "w2 w3 no", "label": "b"}])
    assert tokenize(split, ["a", "b"], tokenizer, 8).rows == [[0, 3, 4, 5, 0, 6, 7, 2]]
    cut = tokenize(split, ["a", "b"], tokenizer, 5)
    assert cut.rows == [[0, 3, 4, 0, 6]] and cut.labels.tolist() == [1]


def test_limit_takes_examples_evenly():
    split = split_of("", [{"sentence": str(i), "label": i % 2} for i in range(10)])
    assert [text for (text,) in evenly_spaced(split, 4).texts] == ["0", "2", "5", "7"]
    assert evenly_spaced(split, None) == split == evenly_spaced(split, 99)


def test_a_dataset_in_the_hubs_layout_is_read(files, tmp_path):
    """From a folder with the layout of a dataset on the hub."""
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_bytes((files / f"boolq.{split}.json").read_bytes())
    configuration = [f"  - split: {s}\n    path: {s}.jsonl" for s in ("train", "validation")]
    head = ["---", "configs:", "- config_name: boolq", "  data_files:", *configuration, "---", ""]
    (tmp_path / "README.md").write_text("\n".join(head))
    assert load_split("hub", str(tmp_path), "boolq", "validation") == load_split(str(files), "", "boolq", "validation")
    assert len(GLUE_TASKS) == 10 and all(task.hub for task in GLUE_TASKS.values())


def test_mistakes_are_one_sentence(files, exported, tmp_path):
    (tmp_path / "cola.train.json").write_text('{"sentence": "a", "label": 1}\n{"sentence": \n')
    (tmp_path / "cola.validation.json").write_text('{"sentence": "a", "label": 1}\n')
    (tmp_path / "rte.train.json").write_text('{"sentence1": "a", "label": 1}\n')
    (tmp_path / "wsc.train.json").write_text('{"sentence": "a", "label": 1}\n')
    (tmp_path / "wsc.validation.json").write_text('{"sentence": "a", "label": 0}\n')
    command = ["launch/evaluate.py", exported, "--tasks", "glue", "--out", tmp_path / "out", "--glue"]
    for arguments, words in (
        ([tmp_path / "none"], "no such folder"),
        (["hub", "--glue-tasks", "cola"], "nyu-mll/glue cola train cannot be loaded"),
        (["hub", "--glue-tasks", "cula"], "--glue-tasks cula is not on the hub"),
        ([files, "--glue-tasks", "cola"], "cola.train.json cannot be read (No such file"),
        ([tmp_path, "--glue-tasks", "cola"], "cola.train.json is not JSON lines"),
        ([tmp_path, "--glue-tasks", "rte"], "has the columns label, sentence1"),
        ([tmp_path, "--glue-tasks", "wsc"], "wsc has the labels [1] in training and [0] in validation"),
        ([files, "--finetune", "rate=1"], "its keys are learning_rate, batch"),
        ([files, "--finetune", "epochs=many"], "--finetune epochs=many: "),
        ([files, "--finetune", "batch=0"], "--finetune batch=0 must be at least 1"),
    ):
        done = call_script(*command, *arguments, code=2)
        assert words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert parse_settings([]) == FineTuning(5e-5, 64, 10, 10, 200, 128)
