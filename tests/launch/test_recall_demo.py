"""`make recall` in small: data, training, export, evaluation, report; again; and questions to the model."""

import base64
import importlib.util
import io
import json
import os
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import ROOT, call_script, join_ranks

from data_prep.__main__ import parse
from data_prep.prepare import prepare
from data_prep.synthetic.words import KEYS, VALUES
from infini_ds.config import default_recipe
from infini_ds.config.default_recipe import DEFAULT_DATA, RECALL_DATA, DefaultData
from infini_ds.distributed.environment import detect_environment
from infini_ds.evaluation.asking import StoryReader
from infini_ds.evaluation.model_loading import load_evaluated_model
from infini_ds.evaluation.recall_story import (
    LearnedFacts,
    draw_facts,
    known_facts,
    learned_facts,
    other_facts,
    parse_facts,
)
from infini_ds.utils.errors import UserError

pytestmark = pytest.mark.timeout(900)  # the first test waits for the chain, which takes long on a busy machine
SOURCE = (
    "recall:pairs,first=key,keys=16,values=24,before=0-31,multiple=32,queries=4,distance=0-10,documents=60"
    "+pairs,first=key,multiple=32,keys=12,distance=32-100,documents=40"
)
STEPS = ["steps=6", "checkpoint.every=3", "validation.every=3", "schedule.warmup_steps=2", "schedule.decay_steps=2"]
SEGMENTS = ["1", "4", "16", "64", "256"]


class Chain:
    """launch/quickstart.py --recall, whose steps run in this process, which saves the imports of each."""

    def __init__(self, folder: Path):
        spec = importlib.util.spec_from_file_location("quickstart", ROOT / "launch" / "quickstart.py")
        assert spec and spec.loader
        self.script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.script)
        self.script.run_step = self.run_step
        self.folder, self.run = folder, folder / "recall"
        self.printed: dict[str, str] = {}

    def run_step(self, title: str, arguments: list[str], graceful: bool = False) -> None:
        if arguments[:2] == ["-m", "data_prep"]:
            prepare(replace(parse(arguments[2:]), validation_fraction=0.1, workers=1))
            return
        if arguments[:2] == ["-m", "deepspeed.launcher.runner"]:
            arguments = arguments[arguments.index("critical") + 1 :]
            join_ranks(detect_environment())
        self.printed[title] = call_script(*arguments).stdout

    def __call__(self) -> dict[str, str]:
        """Run all steps. Returns what each printed."""
        argv, folder = sys.argv, os.getcwd()
        where = [f"data.path={self.folder / 'data'}", "data.curriculum=[]", f"output={self.folder}"]
        sys.argv = ["quickstart.py", "--recall", *where, *STEPS, "--examples", "2"]
        self.printed = {}
        try:
            self.script.main()
        finally:
            sys.argv = argv
            os.chdir(folder)
        return self.printed


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The finished chain, and what its steps printed."""
    folder = tmp_path_factory.mktemp("recall")
    data = DefaultData(str(folder / "data"), SOURCE, sequence_length=256)
    DEFAULT_DATA[data.path] = data
    chain = Chain(folder)
    chain()
    yield chain
    del DEFAULT_DATA[data.path]


@pytest.fixture
def reader(chain) -> StoryReader:
    export = chain.run / "export"
    model = load_evaluated_model(str(export), torch.device("cpu"))
    return StoryReader(model, known_facts(learned_facts(export), model.tokenizer, export))


def test_the_chain_ends_with_the_headline_and_the_report(chain):
    steps = ["training", "export to Hugging Face format", "accuracy by distance", "report"]
    assert list(chain.printed) == steps
    found = json.loads((chain.run / "evaluation" / "evaluation.json").read_text())["tasks"]["recall"]
    (name, scored), chance = *found["tasks"].items(), 1 / 32
    assert name == "pairs,first=key,keys=16" and scored["chance"] == chance, "24 and 32 values: evaluated with 32"
    assert [str(point["segments"]) for point in scored["points"]] == SEGMENTS

    report = (chain.run / "report" / "report.md").read_text()
    for point in scored["points"]:
        accuracy = [f"{point['accuracy'][setting]:.3f}" for setting in ("on", "off", "other")]
        assert f"| {' | '.join([str(point['segments']), '2', *accuracy, f'{chance:.3f}'])} |" in report
    on = scored["points"][3]["accuracy"]["on"]
    headline = f"After 64 segments of filler, 2,048 words, the model answers {on:.1%} of 2 questions correctly"
    assert headline in report and headline in chain.printed["report"]
    assert "trained: 6 steps, 6,144 tokens, with at most 4 segments between facts and question" in report
    assert f"--recall {name} --segments {' '.join(SEGMENTS)}" in report, "the command that gave the numbers"

    pictures = [(chain.run / "report" / name).read_bytes() for name in ("accuracy.png", "loss.png")]
    page = (chain.run / "report" / "report.html").read_text()
    assert [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)] == pictures
    assert f"{chain.run / 'report' / 'report.html'}\n\n--- try next" in chain.printed["report"]
    assert f"python launch/ask.py {chain.run / 'export'}\n" in chain.printed["report"]


def test_the_report_shows_the_models_own_answers(chain, reader):
    report = (chain.run / "report" / "report.md").read_text()
    facts, key = (re.search(pattern, report, re.MULTILINE)[1] for pattern in (r"^> (.+)\n>\n> ", r"^> \? (\w+)$"))
    reader.read(parse_facts("facts", facts, reader.learned), 64)
    answers = reader.ask(key)
    for setting, label in (("on", "memory on"), ("off", "memory off"), ("other", "memory of another document")):
        shown = ", ".join(f"{word} {probability:.3f}" for word, probability in answers.candidates[setting])
        right = "right" if answers.is_right(setting) else "wrong"
        assert f"| {label} | **{answers.candidates[setting][0].word}** | {right} | {shown} |" in report
    assert f"answer is **{answers.value}**" in report and "431 sentences of filler" in report


def test_again_nothing_is_computed(chain):
    parts = chain.run / "evaluation" / "parts.json"
    files = [parts, chain.folder / "data" / "manifest.json", *(chain.run / "checkpoints").rglob("*")]
    before = {file: file.stat().st_mtime_ns for file in files if file.is_file()}
    report = (chain.run / "report" / "report.md").read_text()
    again = chain()
    assert "nothing to do" in again["training"]
    assert {file: file.stat().st_mtime_ns for file in before} == before
    timed = re.compile(r"in [\d.]+ s|in [\d.]+ ms")
    assert timed.sub("", (chain.run / "report" / "report.md").read_text()) == timed.sub("", report)


@pytest.mark.parametrize("facts", ["Anna bear Bob cat Amy dog", "bear Anna Bob cat"])
def test_answers_are_those_of_the_complete_text(facts, reader):
    """A story that is read once gives what the model computes from facts, filler and question at once."""
    reader.read(parse_facts("facts", facts, reader.learned), 3)
    model, tokenizer, S = reader.model, reader.evaluated.tokenizer, reader.model.config.segment_length
    question = tokenizer.encode(" ? Bob", add_special_tokens=False)
    rows = [story.tokens + question for story in (reader.story, reader.other)]
    text = tokenizer.decode(rows[0][1:])
    assert text == f"{facts} {' '.join(reader.story.filler)} ? Bob"
    assert len(reader.story.tokens) == 4 * S, "the facts' segment, and three"
    ids = torch.tensor(rows)
    options = {"on": {}, "off": {"use_memory": False}, "other": {"memory_of": torch.tensor([1, 1])}}
    answers = reader.ask("Bob")
    with torch.no_grad():
        for setting, option in options.items():
            hidden = model.transformer(ids, **option).last_hidden_state[0, -1]
            want = model.lm_head(hidden).softmax(-1)
            assert torch.allclose(reader.probabilities("Bob", setting), want, atol=1e-6), setting
            top = want.topk(3)
            words, probabilities = zip(*answers.candidates[setting], strict=True)
            assert list(words) == tokenizer.convert_ids_to_tokens(top.indices.tolist())
            assert probabilities == pytest.approx(top.values.tolist(), abs=1e-6)
    on, off, other = (reader.probabilities("Bob", setting) for setting in options)
    assert min((on - off).abs().max(), (on - other).abs().max()) > 1e-4, "the settings differ"
    assert answers.value == "cat" and answers.other_value != "cat"


def test_a_cache_has_one_size_for_stories_of_any_length(reader):
    facts = parse_facts("facts", "Anna bear", reader.learned)
    sizes = []
    for segments in (2, 40):
        reader.read(facts, segments)
        sizes.append((len(reader.story.tokens), reader.cache.nbytes()))
    assert sizes[1][0] > 10 * sizes[0][0] and sizes[0][1] == sizes[1][1]


def test_a_conversation(chain, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Bob\n?\nCharles?\nKate\nAmy cow bed Ben\nBen\n2\n\nAnna\n"))
    arguments = [chain.run / "export", "--facts", "Anna bear Bob cat", "--segments", "3"]
    parts = call_script("launch/ask.py", *arguments).stdout.strip().split("\n\n")
    told, bob, help_line, nothing, unknown, new, ben, nearer, *rest = [p for p in parts if "Read once" not in p]
    assert told.startswith("Anna bear Bob cat\n") and "more words of filler" in told
    assert re.match(r"\? Bob\n  memory on  .*\((right|wrong)\)\n  memory off  ", bob) and "says Bob" in bob
    assert help_line.startswith("a name asks for its thing")
    assert nothing == "question Charles: the story says nothing of Charles: ask for Anna, Bob"
    assert unknown.startswith("facts Kate: Kate is no word that the model has learned") and "\n" not in unknown
    assert new.startswith("Amy cow bed Ben\n") and ben.startswith("? Ben\n")
    assert nearer.startswith("Amy cow bed Ben\n") and len(nearer) < len(new), "a number is a distance"
    assert not rest, "an empty line ends it"


def test_questions_without_a_terminal(chain, reader):
    options = ["--facts", "Anna bear Bob cat", "--segments", "5", "--ask", "Bob", "--ask", "Anna"]
    printed = call_script("launch/ask.py", chain.run / "export", *options).stdout
    reader.read(parse_facts("facts", "Anna bear Bob cat", reader.learned), 5)
    for key in ("Bob", "Anna"):
        word, probability = reader.ask(key).candidates["on"][0]
        assert re.search(rf"\? {key}\n  memory on +{word} {probability:.3f}, ", printed)
    size = f"{reader.cache.nbytes():,} bytes"
    assert re.search(rf"Read once, in \d+\.\d\d s: 192 words in 6 segments\. The cache has {size}", printed)


def test_mistakes_are_one_sentence(chain):
    words = f"(names are {', '.join(KEYS[:16])}, and things are {', '.join(VALUES[:32])})"
    for arguments, sentence in (
        (["--facts", "Tom lamp"], f"--facts Tom lamp: Tom is no word that the model has learned {words}"),
        (["--facts", "Anna beer"], "Anna beer: beer is no word that the model has learned (did you mean bear? names"),
        (["--facts", "Anna bear Bob"], "--facts Anna bear Bob: Bob is no fact: give a name and a thing each, such as"),
        (["--facts", "Anna Bob"], "--facts Anna Bob: Anna Bob is no fact: give a name and a thing each, such as Adam"),
        (["--facts", "Anna bear Anna cat"], "--facts Anna bear Anna cat: Anna has two things: give each name one"),
        (["--facts", " "], "--facts is empty: give facts, such as Adam apple"),
        (["--facts", "Anna bear", "--ask", "Bob"], "--ask Bob: the story says nothing of Bob: ask for Anna"),
        (["--pairs", "17"], "--pairs 17 must be 1 to 16, the names that the model has learned"),
        (["--segments", "100001"], "--segments 100001 must be 0 to 100000"),
    ):
        error = call_script("launch/ask.py", chain.run / "export", *arguments, code=2).stderr
        assert sentence in error and error.startswith("error: ") and error.count("\n") == 1, error


def test_a_report_of_another_model_or_of_none_is_refused(chain, tmp_path):
    error = call_script("launch/report.py", "--recall", chain.run / "export", code=2).stderr
    assert "is an export: name the run" in error
    file = chain.run / "evaluation" / "evaluation.json"
    evaluation = file.read_text()
    try:
        found = json.loads(evaluation)
        found["model"]["sha256"] = "0"
        file.write_text(json.dumps(found))
        error = call_script("launch/report.py", "--recall", chain.run, code=2).stderr
    finally:
        file.write_text(evaluation)
    assert "has no accuracy of this model: evaluate it with --tasks recall --recall pairs,first=key,keys=16" in error


def test_learned_facts_of_a_source(tmp_path):
    """Natural order, if any facts have it; text without pairs is refused; an export alone knows all words."""
    model = tmp_path / "run" / "export"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "infini_gpt_neo"}')
    assert learned_facts(model) == LearnedFacts(KEYS, VALUES, "key", None)
    manifest = model.parent / "data_manifest.json"

    def trained_on(*sources: str) -> LearnedFacts:
        streams = [{"manifest": {"options": {"source": source}}} for source in sources]
        manifest.write_text(json.dumps({"streams": streams}))
        return learned_facts(model)

    assert trained_on("recall:pairs,first=value,distance=7") == LearnedFacts(KEYS[:32], VALUES[:32], "value", 7)
    both = trained_on("recall:pairs,first=value+passkey", "recall:pairs,keys=40,values=64,distance=3-600", "stdlib")
    assert both == LearnedFacts(KEYS[:40], VALUES, "key", 600)
    assert both.task == "pairs,first=key,keys=40,values=64"
    with pytest.raises(UserError, match="was trained on stdlib, which has no facts of two words: train on pairs"):
        trained_on("stdlib")


def test_drawn_facts_have_different_names_and_things():
    learned, rng = LearnedFacts(KEYS[:20], VALUES[:9], "value", None), random.Random(0)
    facts = draw_facts(learned, 9, rng)
    assert len({fact.key for fact in facts}) == len({fact.value for fact in facts}) == 9
    assert all(fact.text == f"{fact.value} {fact.key}" for fact in facts)
    others = other_facts(facts, learned, rng)
    assert [fact.key for fact in others] == [fact.key for fact in facts]
    assert all(a.value != b.value for a, b in zip(facts, others, strict=True))
    assert len(draw_facts(learned, 20, rng)) == 20, "more names than things"


def test_the_recipe_names_the_folders_that_the_project_prepares(monkeypatch):
    monkeypatch.chdir(ROOT)
    data = default_recipe.default_data(default_recipe.load_recipe("launch/recipes/recall.yaml", []))
    assert data == list(RECALL_DATA) and all("--vocab-size" not in folder.prepare for folder in data)
    streams = "data.streams=[{path: data/recall-3-far}, {path: data/stdlib}, {path: data/books}]"
    overrides = [streams, "data.curriculum=[]"]
    found = default_recipe.default_data(default_recipe.load_recipe("launch/recipes/recall.yaml", overrides))
    assert [folder.path for folder in found] == ["data/recall-3-far", "data/stdlib"]


def test_a_plan_before_the_data_are_prepared_takes_the_longest_rows(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = default_recipe.load_recipe(ROOT / "launch/recipes/recall.yaml", [])
    longest = max(folder.sequence_length for folder in RECALL_DATA)
    assert default_recipe.with_data_to_prepare(recipe).plan.sequence_length == longest == 2304


def test_too_few_examples_are_refused_before_anything_is_done():
    done = call_script("launch/quickstart.py", "--recall", "--examples", "1", code=2)
    assert "--examples 1 must be at least 2" in done.stderr and not done.stdout
