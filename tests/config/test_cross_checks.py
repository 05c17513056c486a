"""Checks that need more than one key: one sentence, with where each key was given."""

import pytest

from infini_ds.config.recipe import load_recipe
from infini_ds.utils.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["batch.tokens=4096"], ["batch.tokens=4096 and batch.rows=4", "exactly one of the two"]),
        (["batch.rows=null"], ["batch.tokens=null and batch.rows=null", "exactly one of the two"]),
        (["schedule.kind=wsd"], ["schedule.kind=wsd with schedule.decay_steps=0", "at least 1"]),
        (["schedule.warmup_steps=2000"], ["schedule.warmup_steps=2000", "more than steps=1000: shorten them"]),
        (["schedule.decay_steps=999", "schedule.kind=wsd"], ["schedule.decay_steps=999", "steps=1000"]),
        (["schedule.decay_steps=99%", "schedule.kind=wsd"], ["schedule.decay_steps=99%", "steps=1000"]),
        (["checkpoint.keep_best=true", "validation.every=0"], ["checkpoint.every=500", "validation.every=0"]),
        (["checkpoint.keep_best=true", "validation.every=300"], ["checkpoint.every=500", "validation.every=300"]),
        (["checkpoint.keep_best=true", "validation.every=30%"], ["checkpoint.every=500", "every=30% (300 steps)"]),
        (["stability.on_spike=roll_back", "stability.spike_sigmas=0"], ["no loss is a spike", "on_spike=flag"]),
        (["validation.recall=pairs+words"], ["validation.recall=pairs+words: unknown task 'words'"]),
        (["validation.recall=pairs,pears=3"], ["validation.recall=pairs,pears=3", "did you mean pairs?"]),
        (["deepspeed=nowhere.json"], ["deepspeed=nowhere.json is not a file"]),
        (["data.path=x", "data.streams=[{path: a}]"], ["data.path=x and data.streams are both given"]),
        (["data.streams=[{path: a, proportion: 1}, {path: b}]"], ["data.streams[1].proportion=null", "or none"]),
        (["data.streams=[{path: a}, {path: b, proportion: 1}]"], ["data.streams[1].proportion=1.0", "or none"]),
        (["data.streams=[{path: a, proportion: 1, repeat: 2}]"], ["data.streams[0] has a proportion and a repeat"]),
        (["data.curriculum=[{path: a, steps: 5}, {path: b}]", "data.path=x"], ["data.path=x and data.curriculum are"]),
        (["data.curriculum=[{path: a, steps: 5}, {path: b}]", "data.streams=[{path: c}]"], ["data.streams and data.c"]),
        (["data.curriculum=[{path: a}, {path: b}]"], ["data.curriculum[0].path=a has neither steps nor until"]),
        (["data.curriculum=[{path: a, steps: 5}, {path: b, until: 0.5}]"], ["[1].until=0.5, but the last stage lasts"]),
        (["data.curriculum=[{path: a, until: 0.5}, {path: b}]"], ["[0].until=0.5, but no recall", "validation.recall"]),
        (
            ["data.curriculum=[{path: a, until: 0.5, recall: pairs}, {path: b}]", "validation.every=0"],
            ["data.curriculum[0].until=0.5 with validation.every=0", "the steps between them"],
        ),
        (
            ["data.curriculum=[{path: a, until: 0.5, recall: pears}, {path: b}]"],
            ["data.curriculum[0].recall=pears: unknown task 'pears'"],
        ),
    ],
)
def test_conflicts_get_a_sentence(overrides, words):
    with pytest.raises(UserError) as error:
        load_recipe(None, ["batch.rows=4", *overrides])
    sentence = str(error.value)
    words = [*words, f"{overrides[0].partition('=')[0]} on the command line"]
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_a_conflict_between_file_and_command_line_names_both(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("batch: {rows: 2}\nschedule: {warmup_steps: 30}\n")
    with pytest.raises(UserError) as error:
        load_recipe(file, ["steps=010"])
    assert str(error.value).endswith(
        "more than steps=10: shorten them, or give shares of the steps, such as schedule.warmup_steps=10% "
        f"(schedule.warmup_steps in {file}, steps on the command line)"
    )


def test_a_file_of_the_users_is_found_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text("{}")
    assert load_recipe(None, ["batch.rows=4", "deepspeed=~/ds.json"]).deepspeed == f"{tmp_path}/ds.json"
