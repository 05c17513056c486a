"""Recall during training: what is measured, on any number of ranks, and that training goes on as without it."""

import pytest
import torch
from harness import SHAPE, STEPS, build, run_ranks
from reference import random_ids, tiny_model

from data_prep.prepare import PrepareOptions, prepare
from data_prep.synthetic.specs import parse_task
from infini_ds.evaluation.model_loading import load_evaluated_model
from infini_ds.evaluation.tasks.recall import compute_scores
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.training.recall import SEED, RecallExamples, draw_examples, measure_recall
from infini_ds.utils.errors import UserError

TASKS = "pairs,first=value,pairs=2,values=2,distance=40+question,pairs=2,values=2,distance=10"
RECALL = [f"validation.recall={TASKS}", "validation.recall_examples=30", "validation.every=6", "validation.rows=4"]
ON = "validation/recall/pairs_first_value_pairs_2_values_2_distance_40"
OFF = "validation/recall_memory_off/question_pairs_2_values_2_distance_10"


@pytest.fixture(scope="module")
def recall_data(tmp_path_factory):
    """Rows of 128 tokens of two pairs and questions in the same segment."""
    out = tmp_path_factory.mktemp("recall") / "data"
    source = "recall:pairs,first=value,pairs=2,values=2,queries=4,distance=0,multiple=32,documents=800"
    prepare(PrepareOptions(source=source, out=out, sequence_length=128, workers=1), quiet=True)
    return out


def recorded(run, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in read_metrics(run) if name in line]


@pytest.fixture(scope="module")
def run(recall_data, tmp_path_factory):
    """A run of one rank that measures recall."""
    output = tmp_path_factory.mktemp("runs")
    build(f"data.path={recall_data}", f"output={output}", "name=one", *SHAPE, *STEPS, *RECALL).fit()
    return output / "one"


def test_accuracy_is_the_share_of_answers_that_greedy_decoding_gives():
    """Answers that the model itself generates with the memory on, some of them changed, in rows of several lengths."""
    model = tiny_model(4, torch.float32)
    rows, answers = [], []
    with torch.no_grad():
        off = 0
        for seed in range(7):
            row = random_ids(1, 30 - seed, seed)[0].tolist()
            begin = len(row)
            for _ in range(2):
                row.append(model(torch.tensor([row])).logits[0, -1].argmax().item())
            if seed % 3 == 0:
                row[-1] = row[-1] % 18 + 1
            rows.append(row)
            answers.append([(begin, begin + 1), (begin, begin + 2)])
            without = [
                model(torch.tensor([row[:at]]), use_memory=False).logits[0, -1].argmax().item() == row[at]
                for at in (begin, begin + 1)
            ]
            off += without[0] + all(without)
    model.train()
    found = measure_recall(model, RecallExamples("made", rows, answers))
    assert (found.on, found.off) == (11 / 14, off / 14) and 0 < found.off < found.on
    assert model.training


def test_it_is_what_the_evaluation_measures(run):
    evaluated = load_evaluated_model(str(run), torch.device("cpu"))
    for task in TASKS.split("+"):
        (examples,) = draw_examples([task], 30, evaluated.tokenizer, evaluated.start_ids[0]).values()
        found, scores = (
            measure_recall(evaluated.model, examples),
            compute_scores(evaluated, parse_task(task), 30, SEED, 16_384),
        )
        assert (found.on, found.off) == (scores.accuracy["on"], scores.accuracy["off"])
        assert 0 < found.on < 1, "a trained model gives some of the answers"


def test_no_training_text_has_the_examples_seed():
    with pytest.raises(UserError, match="seed=-1"):
        parse_task(f"pairs,seed={SEED}")
    first, again = (parse_task("pairs").example(seed, 0, str.split).text for seed in (SEED, 0))
    assert first != again


def test_it_is_recorded_and_logged_at_each_validation(run):
    assert [step for step, _ in recorded(run, ON)] == [0, 6, 12, 18, 20]
    assert all(0 <= value <= 1 for _, value in recorded(run, ON) + recorded(run, OFF))
    assert len(recorded(run, OFF)) == 5 and len({value for _, value in recorded(run, ON)}) > 1


def test_training_goes_on_as_without_it(run, recall_data, tmp_path, capsys):
    plain = ["validation.every=6", "validation.rows=4"]
    build(f"data.path={recall_data}", f"output={tmp_path}", "name=plain", *SHAPE, *STEPS, *plain).fit()
    assert "recall" not in capsys.readouterr().out
    for name in ("train/loss", "validation/loss"):
        assert recorded(tmp_path / "plain", name) == recorded(run, name)


@pytest.mark.parametrize("own", [["batch.micro_rows=1"], ["parallel.sequence=2"]], ids=["data", "sequence"])
def test_two_ranks_measure_what_one_does(own, run, recall_data, tmp_path):
    """Also ranks that share rows in training. 30 examples are no multiple of a batch."""
    shape = [*SHAPE, *STEPS, *RECALL, *own]
    output = run_ranks(2, f"data.path={recall_data}", f"output={tmp_path}", "name=two", *shape)
    for name in (ON, OFF):
        assert recorded(tmp_path / "two", name) == recorded(run, name)
    lines = [line for line in output.splitlines() if line.startswith("step 6: recall 0.")]
    assert len(lines) == 2 and lines[1].endswith("(question,pairs=2,values=2,distance=10)")


def test_a_requested_stop_ends_it(run, recall_data, tmp_path):
    model = tiny_model(4, torch.float32).train()
    asked = []
    examples = RecallExamples("long", [random_ids(1, 3000, seed)[0].tolist() for seed in range(4)], [[(2, 3)]] * 4)
    assert measure_recall(model, examples, lambda: bool(asked.append(1)) or len(asked) == 3) is None
    assert len(asked) == 3 and model.training


def test_a_stop_before_a_validation_is_made_up_for(run, recall_data, tmp_path):
    """The signal comes while recall is measured at step 12: all of that validation is repeated when the run resumes."""
    where = [f"data.path={recall_data}", f"output={tmp_path}", "name=stopped", *SHAPE, *STEPS, *RECALL]
    trainer = build(*where)
    agree, calls = trainer.shutdown.agree, []

    def stop_in_recall(device) -> bool:
        calls.append(trainer.state.step)
        if calls.count(12) == 5:  # two batches of validation rows, with the memory on and off, come first
            trainer.shutdown.agreed = 15
        return agree(device)

    trainer.shutdown.agree = stop_in_recall
    assert not trainer.fit() and trainer.state.step == 12
    assert [step for step, _ in recorded(tmp_path / "stopped", ON)] == [0, 6]
    build(*where).fit()
    for name in (ON, OFF, "train/loss"):
        assert recorded(tmp_path / "stopped", name) == recorded(run, name)


def test_a_tokenizer_without_words_of_the_filler_gets_a_sentence(tmp_path):
    """One whose tokens are bytes."""
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} {TASKS} " * 20)
    source, data = f"text:{tmp_path / 'texts'}", tmp_path / "data"
    options: dict = {"vocab_size": 258, "sequence_length": 64, "workers": 1, "validation_fraction": 0.2}
    prepare(PrepareOptions(source=source, out=data, **options), quiet=True)
    with pytest.raises(
        UserError, match=r"^validation.recall: recall of passkey: the tokenizer splits every word of the filler"
    ):
        build(f"data.path={data}", f"output={tmp_path}", *SHAPE, *STEPS, "validation.recall=passkey")
