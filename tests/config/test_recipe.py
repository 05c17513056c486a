"""Recipes: each shipped one is sound, each mistake gets one sentence, text means what the key's type says."""

import math
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from harness import ROOT
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from infini_ds.config.batch_shape import batch_shape
from infini_ds.config.keys import Key, list_keys
from infini_ds.config.loader import Loader
from infini_ds.config.recipe import RECIPE_FILE, SYNONYMS, Recipe, StreamSection, load_recipe, load_run_recipe
from infini_ds.model.presets import preset_config
from infini_ds.utils.errors import UserError

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
EARLIER = Path(__file__).with_name("recipe_of_an_earlier_run.yaml")
KEYS = list(list_keys(Recipe))
NUMBERS = [key for key in KEYS if {int, float} & {key.field.annotation, *get_args(key.field.annotation)}]
COMMAND_LINE = "on the command line"
many = settings(deadline=None, max_examples=200, derandomize=True)


def test_recipes_of_all_sizes_are_shipped():
    names = {"tiny-cpu", "tiny-gpu", "books-cpu", "33m", "125m", "350m", "1.3b", "2.7b"}
    assert {path.stem for path in RECIPES} >= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_sound(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem or path.stem.startswith(recipe.name)
    shape = batch_shape(recipe.batch, 8192, 1)
    assert shape.micro_rows * shape.accumulation == shape.rows
    preset_config(recipe.model.preset, segment_length=recipe.model.segment_length or 128)


def test_defaults_are_a_recipe():
    assert load_recipe(None, ["batch.rows=1"]).folder == Path("runs/run")
    assert Recipe().model.preset == "tiny"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stepz=3", ["unknown key stepz on the command line", "did you mean steps?"]),
        ("model.segmnt_length=3", ["unknown key model.segmnt_length", "did you mean model.segment_length?"]),
        ("learning_rate=1", ["unknown key learning_rate", "did you mean optimizer.learning_rate?"]),
        ("optimizer.lr=1", ["unknown key optimizer.lr", "did you mean optimizer.learning_rate?"]),
        ("model.hidden_size=64", ["unknown key model.hidden_size", "did you mean model.config.hidden_size?"]),
        ("batch_size=8", ["did you mean batch.rows?"]),
        ("epochs=1", ["did you mean steps?"]),
        ("STEPS=1", ["did you mean steps?"]),
        ("+steps=1", ["did you mean steps?"]),
        ("optimizer.learning-rate=1", ["did you mean optimizer.learning_rate?"]),
        ("model.rotary=1", ["unknown key model.rotary", "known are preset, start_from"]),
        ("steps\u200b=1", [r"unknown key 'steps\u200b'", "did you mean steps?"]),
        (".steps=1", ["unknown key ''", "known are name"]),
        ("keep_best=1", ["did you mean checkpoint.keep_best?"]),
        ("zzz=1", ["unknown key zzz", "known are name, output, steps"]),
        ("a.b.c=1", ["unknown key a on the command line"]),
        ("stability.rollbacks=3", ["unknown key stability.rollbacks", "did you mean stability.max_rollbacks?"]),
        ("guard.roll_backs=3", ["unknown key guard", "did you mean stability, its name today?"]),
        ("stability.roll_backs=3", ["did you mean stability.max_rollbacks, its name today?"]),
        ("steps=many", ["steps=many on the command line must be an integer of at least 1"]),
        ("steps=0", ["steps=0 on the command line must be an integer of at least 1"]),
        ("steps=0x10", ["steps=0x10", "an integer"]),
        ("steps=null", ["steps=null", "an integer"]),
        ("steps=[1,2]", ["steps=", "must be an integer of at least 1"]),
        ("steps={a: 1}", ["steps", "must be an integer of at least 1, not a group of keys"]),
        ("steps.x=1", ["steps", "must be an integer of at least 1, not a group of keys"]),
        ("steps", ["override 'steps' is not of the form key=value"]),
        ("=3", ["override '=3' is not of the form key=value"]),
        ("steps=[1", ["steps=[1 on the command line cannot be read as YAML", "(line 1, column 3)"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate=-1", "a number of at least 0"]),
        ("optimizer.learning_rate=inf", ["optimizer.learning_rate=inf", "a finite number of at least 0"]),
        ("optimizer.beta2=1.5", ["optimizer.beta2=1.5", "at least 0 and below 1"]),
        ("precision=fp16", ["precision=fp16", "must be auto, fp32 or bf16"]),
        ("model.attention=flash", ["model.attention=flash", "must be sdpa or flex_attention"]),
        ("model.truncate_blocks=0", ["model.truncate_blocks=0", "must be an integer of at least 1 or null"]),
        ("model.segments_per_block=many", ["model.segments_per_block=many", "an integer of at least 1, auto or null"]),
        ("model.segments_per_block=0", ["model.segments_per_block=0", "an integer of at least 1, auto or null"]),
        ("model.position_embedding=none", ["must be segment, rotary or null"]),
        ("model.gate_init=nan", ["model.gate_init=nan", "a finite number or null"]),
        ("model.config=3", ["model.config=3", "a group of keys"]),
        ("batch=3", ["batch=3 on the command line must be a group of keys, such as batch.tokens"]),
        ("stability=false", ["stability=false", "a group of keys, such as stability.max_consecutive_skips"]),
        ("stability.max_consecutive_skips=2.5", ["stability.max_consecutive_skips=2.5", "an integer of at least 1"]),
        ("stability.check_gradients=maybe", ["stability.check_gradients=maybe", "true or false"]),
        ("stability.on_spike=rollback", ["stability.on_spike=rollback", "flag or roll_back"]),
        ("seed=99999999999999999999", ["seed=99999999999999999999", "below 2147483648"]),
        ("plan.mfu=40", ["plan.mfu=40", "above 0 and at most 1"]),
        ("timeout_minutes=1e9", ["timeout_minutes=1e9", "above 0 and below 1000000"]),
        ("name=a/b", ["name=a/b", "the name of one folder", "output="]),
        ("name=", ["name=null", "the name of one folder"]),
        ("data.path=", ["data.path=null", "a path or address"]),
        ("data.cache_limit=lots", ["data.cache_limit=lots", "a number of bytes such as 200GB or 64MiB"]),
        ("data.streams=3", ["data.streams=3", "a list of streams"]),
        ("data.streams=[3]", ["data.streams[0]=3", "a group of keys, such as data.streams[0].path"]),
        ("data.streams=[{proportion: 1}]", ["data.streams[0] on the command line has no path: give it a folder"]),
        ("data.streams=[{path: a, repeat: -1}]", ["data.streams[0].repeat=-1", "above 0", "leave the stream out"]),
        ("data.streams=[{path: a, proportoin: 1}]", ["unknown key data.streams[0].proportoin", "[0].proportion?"]),
        ("output=${oc.env:NO_SUCH_VARIABLE}", ["interpolation in output", "NO_SUCH_VARIABLE"]),
    ],
)
def test_mistakes_get_a_sentence(override, words):
    with pytest.raises(UserError) as error:
        load_recipe(None, ["batch.rows=4", override])
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


@pytest.mark.parametrize("key", [*(key.name for key in KEYS), *SYNONYMS])
def test_no_hint_names_the_key_that_was_typed(key):
    """Nor a key that is refused as unknown in its turn."""
    last = key.rpartition(".")[2]
    for typed in (last, f"model.{last}", f"x.{key}", f"{key[:-1]}", f"{key}s", f"{key.upper()}", key.replace("_", "-")):
        try:
            load_recipe(None, ["batch.rows=1", f"{typed}=1"])
        except UserError as error:
            if "did you mean" in str(error):
                hint = str(error).partition("did you mean ")[2].partition("?")[0].partition(",")[0]
                assert hint != typed
                with pytest.raises(UserError) as second:
                    load_recipe(None, ["batch.rows=1", f"{hint}=[1"])
                assert "unknown key" not in str(second.value)


def bounds_of(key: Key) -> dict[str, float]:
    return {name: getattr(m, name) for m in key.field.metadata for name in ("ge", "gt", "le", "lt") if hasattr(m, name)}


def refused(key: Key) -> st.SearchStrategy[str]:
    """Texts that the key cannot mean."""
    annotation = key.field.annotation
    members = {*(get_args(annotation) if get_origin(annotation) is not Literal else ()), annotation}
    bounds = bounds_of(key)
    lists = st.sampled_from(["[1, 2]", "[]"])
    if bool in members:
        return lists | st.sampled_from(["maybe", "2", "null", "truee", ""])
    if {int, float} & members or key.name == "model.segments_per_block":
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        texts = [lists, st.sampled_from(["nan", "inf", "-inf", ".nan", "many", "1,5", "true"])]
        if low is not None:
            texts.append(st.integers(max_value=math.ceil(low) - 1).map(str))
            texts.append(st.floats(max_value=low, exclude_max="ge" in bounds, allow_infinity=False).map(repr))
        if high is not None:
            texts.append(st.integers(min_value=math.floor(high) + 1).map(str))
            texts.append(st.floats(min_value=high, exclude_min="le" in bounds, allow_infinity=False).map(repr))
        return st.one_of(texts)
    if any(get_origin(member) is Literal for member in members):
        return lists | st.text("abcdefgh", min_size=1)
    return (
        lists if key.name not in ("data.streams", "data.curriculum") else st.sampled_from(["3", "null", "text", "[3]"])
    )


@many
@given(st.data())
def test_a_value_out_of_bounds_gives_one_sentence_that_names_the_key(data):
    key = data.draw(st.sampled_from(KEYS))
    text = data.draw(refused(key))
    with pytest.raises(UserError) as error:
        load_recipe(None, ["batch.rows=4", f"{key.name}={text}"])
    sentence = str(error.value)
    assert sentence.startswith(key.name) and "\n" not in sentence and COMMAND_LINE in sentence, sentence
    assert f" must be {key.values.split()[0]}" in sentence, sentence


@many
@given(st.data())
def test_a_number_within_bounds_is_taken_from_text_and_from_yaml(data):
    key = data.draw(st.sampled_from(NUMBERS))
    bounds = bounds_of(key)
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if int in {key.field.annotation, *get_args(key.field.annotation)}:
        value = data.draw(st.integers(low, None if high is None else high - 1))
    else:
        value = data.draw(st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds, allow_nan=False))
        assume(math.isfinite(value))
    loader = Loader(Recipe)  # without the checks across keys
    loader.add_overrides([f"{key.name}={value!r}"])
    found = loader.build()
    for part in key.name.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@many
@given(st.data())
def test_a_misspelt_key_is_unknown_and_never_suggested_itself(data):
    known = {key.name for key in KEYS} | {*Recipe.model_fields}
    right = data.draw(st.sampled_from(sorted(known)))
    i, letter = data.draw(st.integers(0, len(right) - 1)), data.draw(st.sampled_from(["", "x", "_", "."]))
    wrong = data.draw(st.sampled_from([right[:i] + letter + right[i + 1 :], right.upper(), right.split(".")[-1]]))
    assume(wrong not in known and not wrong.startswith("model.config.") and wrong.strip("."))
    with pytest.raises(UserError) as error:
        load_recipe(None, ["batch.rows=4", f"{wrong}=1"])
    sentence = str(error.value)
    assert "\n" not in sentence and COMMAND_LINE in sentence and f"did you mean {wrong}?" not in sentence, sentence


@many
@given(st.text("abz019 #:._-+~,=&%", min_size=1))
def test_a_name_stays_as_it_is_typed(text):
    assume(text.strip() not in ("", "~", ".", ".."))
    assert load_recipe(None, ["batch.rows=4", f"name={text}"]).name == text.strip()


@pytest.mark.parametrize("name", ["1.10", "0730", "on", "run #2", "1e3", "2024-01-01", "1:30", "0x10", "No", "a: b"])
def test_a_name_is_text_on_the_command_line_and_in_a_file(name, tmp_path):
    assert load_recipe(None, ["batch.rows=4", f"name={name}"]).name == name
    assert load_recipe(None, ["batch.rows=4", f'name="{name}"']).name == name
    if name not in ("run #2", "a: b"):  # in a file these need quotes
        (tmp_path / "plain.yaml").write_text(f"name: {name}\nbatch: {{rows: 2}}\n")
        assert load_recipe(tmp_path / "plain.yaml").name == name
    (tmp_path / "quoted.yaml").write_text(f'name: "{name}"\nbatch: {{rows: 2}}\n')
    recipe = load_recipe(tmp_path / "quoted.yaml")
    assert recipe.name == name
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_numbers_are_decimal():
    assert load_recipe(None, ["batch.rows=4", "steps=0100"]).steps == 100
    assert load_recipe(None, ["batch.rows=4", "steps=1_000"]).steps == 1000
    assert load_recipe(None, ["batch.rows=4", "optimizer.learning_rate=3e-4"]).optimizer.learning_rate == 3e-4


def test_the_home_folder_is_expanded_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    overrides = ["output=~/runs", "data.cache=~/cache", "model.start_from=~/infini", "data.streams=[{path: ~/text}]"]
    recipe = load_recipe(None, ["batch.rows=4", *overrides])
    assert recipe.output == "/home/me/runs" and recipe.data.cache == "/home/me/cache"
    assert recipe.model.start_from == "/home/me/infini" and recipe.data.streams[0].path == "/home/me/text"
    assert load_recipe(None, ["batch.rows=4", "data.path=s3://bucket/~x"]).data.path == "s3://bucket/~x"


def test_interpolations_are_resolved(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    overrides = ["output=${oc.env:SCRATCH}/runs", "name=seed-${seed}", "schedule.warmup_steps=${log_every}"]
    recipe = load_recipe(None, ["batch.rows=4", *overrides])
    assert recipe.folder == Path("/scratch/runs/seed-0") and recipe.schedule.warmup_steps == 10


def test_fields_of_the_model_have_the_types_of_yaml(tmp_path):
    (tmp_path / "r.yaml").write_text("batch: {rows: 2}\nmodel: {config: {hidden_size: 32, resid_dropout: 1e-1}}\n")
    overrides = ["model.config.num_heads=2", "model.config.attention_types=[[[global], 2]]", "model.config.x.y=on"]
    config = load_recipe(tmp_path / "r.yaml", overrides).model.config
    types = {"hidden_size": 32, "resid_dropout": 0.1, "num_heads": 2, "attention_types": [[["global"], 2]]}
    assert config == types | {"x": {"y": True}}


def test_a_file_may_write_keys_with_dots(tmp_path):
    (tmp_path / "r.yaml").write_text("batch.rows: 2\nmodel.config.hidden_size: 64\nmodel: {preset: 33m}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.batch.rows, recipe.model.preset, recipe.model.config) == (2, "33m", {"hidden_size": 64})


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "r.yaml"
    for text, words in [
        ("batch: {rows: 0}", f"batch.rows=0 in {file} must be an integer of at least 1 or null"),
        ("batch: {rows: 2}\nshedule: {kind: wsd}", f"unknown key shedule in {file}: did you mean schedule"),
        ("batch:", f"batch=null in {file} must be a group of keys, such as batch.tokens"),
        ("- 1", "does not hold keys and values"),
        ("steps: [1,", "cannot be read as YAML: "),
        ("steps: 1\nsteps: 2", "found duplicate key steps (line 2"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError) as error:
            load_recipe(file)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_names_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"--config nowhere.yaml does not exist; known are .*launch/recipes/125m.yaml"):
        load_recipe("nowhere.yaml")
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(tmp_path)


def test_the_command_line_comes_after_the_file_and_an_empty_file_gives_defaults(tmp_path):
    (tmp_path / "r.yaml").write_text("steps: 7\nbatch: {rows: 2}\nschedule: {warmup_steps: 1}\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["steps=9", "steps=8", "batch={micro_rows: 2}"])
    assert (recipe.steps, recipe.batch.rows, recipe.batch.micro_rows, recipe.schedule.warmup_steps) == (8, 2, 2, 1)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_recipe(tmp_path / "empty.yaml", ["batch.rows=2"]) == load_recipe(None, ["batch.rows=2"])


def test_an_empty_list_of_streams_replaces_no_path(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("batch: {rows: 2}\ndata: {path: data/books}\n")
    data = load_recipe(file, ["data.streams=[]"]).data
    assert data.path == "data/books" and data.streams == ()


def test_the_home_folder_of_a_recipe_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("batch: {rows: 2}\nsteps: 777\n")
    assert load_recipe("~/recipe.yaml").steps == 777
    with pytest.raises(UserError, match=r"--config ~/none\.yaml does not exist"):
        load_recipe("~/none.yaml")


def test_streams_on_the_command_line_replace_the_path_of_a_file_and_the_other_way_round(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("batch: {rows: 2}\ndata: {path: data/books}\n")
    streams = load_recipe(file, ["data.streams=[{path: a}, {path: b}]"]).data
    assert streams.streams == (StreamSection(path="a"), StreamSection(path="b")) and streams.path == "data/stdlib"
    file.write_text("batch: {rows: 2}\ndata: {streams: [{path: a}]}\n")
    path = load_recipe(file, ["data.path=data/books"]).data
    assert path.path == "data/books" and path.streams == ()
    with pytest.raises(UserError, match=r"both given.*\(data.path on the command line, data.streams on the command"):
        load_recipe(file, ["data.path=x", "data.streams=[{path: a}]"])


def test_a_recipe_is_written_and_read_again(tmp_path):
    overrides = ["batch.rows=3", "data.streams=[{path: 1.10, repeat: 2}]", "model.config.eos=1e-3", "plan.memory=7"]
    for path in [None, *RECIPES]:
        recipe = load_recipe(path, overrides if path is None else [])
        (tmp_path / "r.yaml").write_text(recipe.to_yaml())
        assert load_recipe(tmp_path / "r.yaml") == recipe


@settings(many, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.characters(codec="utf-8", exclude_characters="/$"), min_size=1), seed=st.integers(0, 2**31 - 1))
def test_any_name_is_written_and_read_again(name, seed, tmp_path):
    assume(name not in (".", ".."))
    recipe = Recipe(name=name, seed=seed)
    (tmp_path / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_run_recipe(tmp_path) == recipe


def test_earlier_names_are_read_in_a_run_folder_alone(tmp_path):
    text = yaml.safe_load(EARLIER.read_text())
    text["guard"] |= {"skipped_in_a_row": 7, "roll_backs": 5, "spike_sigmas": 4.0}
    (tmp_path / RECIPE_FILE).write_text(yaml.safe_dump(text))
    recipe = load_run_recipe(tmp_path)
    limits = recipe.stability
    assert (limits.max_consecutive_skips, limits.max_rollbacks, limits.spike_sigmas) == (7, 5, 4.0)
    with pytest.raises(UserError, match=r"unknown key guard .* did you mean stability, its name today"):
        load_recipe(tmp_path / RECIPE_FILE)
    (tmp_path / "data_manifest.json").write_text("{}")  # what makes it a run's folder
    assert load_recipe(tmp_path / RECIPE_FILE) == recipe


def test_a_section_is_frozen_and_checked_when_it_is_made():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().steps = 3
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Recipe(steps=0)
