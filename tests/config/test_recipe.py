"""Recipes, DeepSpeed's JSON, schedules: each shipped one is sound, each mistake gets its sentence."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from harness import ROOT, run_script
from hypothesis import given
from hypothesis import strategies as st

from infini_ds.config.batch_shape import batch_shape
from infini_ds.config.deepspeed_config import deepspeed_config
from infini_ds.config.lr_schedule import factor, gate_factor
from infini_ds.config.recipe import BatchSection, Recipe, ScheduleSection, load_recipe
from infini_ds.model import InfiniGPTNeoConfig
from infini_ds.model.presets import PRESETS, preset_config
from infini_ds.planning.flops import training_flops_per_token
from infini_ds.utils.errors import UserError
from infini_ds.utils.run_lock import acquire_run_lock

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {
        "tiny-cpu",
        "tiny-gpu",
        "books-cpu",
        "33m",
        "125m",
        "350m",
        "1.3b",
        "2.7b",
    }
    assert {path.stem for path in DEEPSPEED} == {
        *("zero2", "zero2_cpu", "zero2_nodes", "zero2_offload", "zero2_one_gpu"),
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_sound(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem or path.stem.startswith(recipe.name)
    shape = batch_shape(recipe.batch, 8192, 1)
    assert shape.micro_rows * shape.accumulation == shape.rows
    preset_config(recipe.model.preset, segment_length=recipe.model.segment_length or 128)


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shipped_deepspeed_json_is_sound(path, precision):
    """Nothing is left on "auto", and DeepSpeed itself accepts the result."""
    from deepspeed.runtime.config import DeepSpeedConfig

    recipe = load_recipe(None, ["batch.rows=8", "batch.micro_rows=2"])
    config = deepspeed_config(path, recipe, batch_shape(recipe.batch, 256, 2), precision)
    assert "auto" not in json.dumps(config)
    assert config["train_batch_size"] == 8 and config["gradient_accumulation_steps"] == 2
    assert config["bf16"]["enabled"] == (precision == "bf16")
    config = deepspeed_config(path, recipe, batch_shape(recipe.batch, 256, 1), precision)
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_optimization_stage == 2 and parsed.gradient_clipping == 1.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stepz=3", ["stepz", "did you mean steps"]),
        ("model.segmnt_length=3", ["model.segmnt_length", "model.segment_length"]),
        ("learning_rate=1", ["learning_rate", "optimizer.learning_rate"]),
        ("steps=many", ["steps", "many"]),
        ("steps=0", ["steps=0", "at least 1"]),
        ("steps", ["steps", "key=value"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate=-1", "at least 0"]),
        ("precision=fp16", ["precision='fp16'", "bf16"]),
        ("schedule.kind=linear", ["schedule.kind='linear'", "wsd"]),
        ("schedule.kind=wsd", ["schedule.decay_steps"]),
        ("schedule.warmup_steps=2000", ["schedule.warmup_steps=2000", "steps=1000"]),
        ("batch.tokens=4096", ["batch.tokens=4096", "batch.rows=4", "exactly one"]),
        ("batch.rows=null", ["exactly one"]),
        ("batch=3", ["batch"]),
        ("model.segments_per_block=many", ["model.segments_per_block='many'", "auto"]),
        ("model.segments_per_block=0", ["model.segments_per_block=0", "at least 1"]),
        ("plan.mfu=40", ["plan.mfu=40", "at most 1"]),
        ("plan.memory=0", ["plan.memory=0", "above 0"]),
        ("steps=[1", ["steps=[1", "key=value"]),
        ("name=a/b", ["name='a/b'", "output="]),
        ("deepspeed=nowhere.json", ["deepspeed=nowhere.json"]),
        ("data.cache_limit=lots", ["data.cache_limit='lots'", "64MiB"]),
        ("data.streams=[{proportion: 1}]", ["data.streams[0] has no path"]),
        ("data.streams=[{path: a, proportion: 1},{path: b}]", ["data.streams[1].proportion=None", "or none"]),
        ("data.streams=[{path: a, proportion: 1, repeat: 2}]", ["data.streams[0]", "one of them"]),
        ("data.streams=[{path: a, repeat: -1}]", ["data.streams[0].repeat=-1", "above 0"]),
        ("data.streams=[{path: a, proportoin: 1}]", ["proportoin", "Did you mean: 'proportion'"]),
        ("checkpoint.keep_every=-1", ["checkpoint.keep_every=-1", "at least 0"]),
        ("checkpoint.keep_best=maybe", ["checkpoint.keep_best", "maybe"]),
        ("stability=false", ["stability", "has to be a group of keys, such as stability.max_consecutive_skips"]),
        ("stability.rollbacks=3", ["stability.rollbacks", "did you mean stability.max_rollbacks?"]),
        ("stability.max_consecutive_skips=0", ["stability.max_consecutive_skips=0", "at least 1"]),
        ("stability.max_consecutive_skips=2.5", ["stability.max_consecutive_skips", "'2.5'", "Integer"]),
        ("stability.max_rollbacks=-1", ["stability.max_rollbacks=-1", "at least 0"]),
        ("stability.spike_sigmas=nan", ["stability.spike_sigmas=nan", "at least 0"]),
        ("stability.spike_window=1", ["stability.spike_window=1", "at least 2"]),
        ("stability.spike_batches=0", ["stability.spike_batches=0", "at least 1"]),
        ("stability.on_spike=rollback", ["stability.on_spike='rollback'", "flag, roll_back"]),
        ("optimizer.learning_rate=inf", ["optimizer.learning_rate=inf", "finite"]),
        ("optimizer.eps=-1", ["optimizer.eps=-1", "at least 0"]),
        ("batch.rows=-4", ["batch.rows=-4", "at least 1"]),
        ("seed=99999999999999999999", ["seed=99999999999999999999", "below 2147483648"]),
        ("data.seed=2147483648", ["data.seed=2147483648", "below"]),
        ("steps=[1,2]", ["steps", "could not be converted to Integer"]),
        ("data.path=", ["data.path", "'None'"]),
        ("stability.check_gradients=maybe", ["stability.check_gradients", "maybe"]),
    ],
)
def test_mistakes_get_a_sentence(override, words):
    with pytest.raises(UserError) as error:
        load_recipe(None, ["batch.rows=4", override])
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_going_back_for_a_spike_needs_spikes():
    with pytest.raises(
        UserError, match=r"stability.on_spike=roll_back, but with stability.spike_sigmas=0 .* deviations, or"
    ):
        load_recipe(None, ["batch.rows=4", "stability.on_spike=roll_back", "stability.spike_sigmas=0"])


@pytest.mark.parametrize("every", [0, 300])
def test_the_best_checkpoint_needs_a_validation_each_time(every):
    with pytest.raises(UserError, match=rf"keep_best=true .* checkpoint.every=500 .* validation.every={every}"):
        load_recipe(None, ["batch.rows=4", "checkpoint.keep_best=true", f"validation.every={every}"])


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("steps: [1,")
    with pytest.raises(UserError, match="is not YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "unknown.yaml").write_text("batch: {rows: 2}\nshedule: {kind: wsd}\n")
    with pytest.raises(UserError, match="shedule"):
        load_recipe(tmp_path / "unknown.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zero_optimisation": {}}, ["zero_optimisation", "zero_optimization"]),
        ({"zero_optimization": {"stage": 3}}, ["stage=3"]),
        ({"train_batch_size": 5}, ["train_batch_size=5", "auto"]),
        ({"checkpoint": {"writer": {"decoupled": True}}}, ["checkpoint=", "decoupled", "leave it out"]),
        ({"gradient_clipping": 9.0}, ["gradient_clipping=9.0", "auto"]),
    ],
)
def test_mistakes_in_deepspeed_json(change, words, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(json.loads((ROOT / "ds_configs" / "zero2_cpu.json").read_text()) | change))
    recipe = load_recipe(None, ["batch.rows=4"])
    with pytest.raises(UserError) as error:
        deepspeed_config(file, recipe, batch_shape(recipe.batch, 256, 1), "fp32")
    assert all(word in str(error.value) for word in words)
    file.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        deepspeed_config(file, recipe, batch_shape(recipe.batch, 256, 1), "fp32")


@given(rows=st.integers(1, 64), world_size=st.integers(1, 8), micro_rows=st.integers(1, 16))
def test_batch_is_divided_without_rest(rows, world_size, micro_rows):
    batch = BatchSection(rows=rows, micro_rows=micro_rows)
    if rows % world_size:
        with pytest.raises(UserError, match="cannot be divided"):
            batch_shape(batch, 128, world_size)
        return
    shape = batch_shape(batch, 128, world_size)
    assert shape.data_size * shape.accumulation * shape.micro_rows == rows
    assert shape.micro_rows <= micro_rows


def test_batch_in_tokens():
    assert batch_shape(BatchSection(tokens=1000, micro_rows=4), 256, 1).rows == 3
    with pytest.raises(UserError, match="less than one row"):
        batch_shape(BatchSection(tokens=100), 256, 1)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_schedule(kind):
    schedule = ScheduleSection(kind=kind, warmup_steps=10, decay_steps=20 if kind == "wsd" else 0, final_ratio=0.1)
    rates = [factor(schedule, 100, step) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[100] == pytest.approx(1.0 if kind == "constant" else 0.1)
    if kind == "wsd":
        assert rates[80] == 1.0 and rates[90] == pytest.approx(0.55)
    assert gate_factor(schedule, 100, 0) == 1.0  # no warm-up for gates
    constant = ScheduleSection(kind=kind, warmup_steps=10, decay_steps=20, gates="constant")
    assert gate_factor(constant, 100, 99) == 1.0


@pytest.mark.parametrize(
    ("name", "millions"),
    # Published sizes; GPT-Neo's with its own vocabulary. The study counts 9.4 with its own shapes.
    [("study-9m", 9.4), ("125m", 125), ("350m", 355), ("1.3b", 1316), ("2.7b", 2651)],
)
def test_presets_have_their_published_size(name, millions):
    import torch

    from infini_ds.model import InfiniGPTNeoForCausalLM

    with torch.device("meta"):
        model = InfiniGPTNeoForCausalLM(preset_config(name))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.03)


def test_every_preset_can_be_built():
    for name in PRESETS:
        preset_config(name, vocab_size=500)


def test_flops_follow_the_usual_rule():
    """About 6 operations for each parameter of a matrix, the embedding counted once, as output layer."""
    config = preset_config("1.3b")
    assert training_flops_per_token(config) == pytest.approx(6 * 1316e6, rel=0.03)


def test_defaults_are_a_recipe():
    assert load_recipe(None, ["batch.rows=1"]).folder == Path("runs/run")
    assert Recipe().model.preset == "tiny"


@pytest.mark.parametrize(
    "override", ["window_size=0", "num_layers=-1", "num_heads=0", "hidden_size=0", "gate_init=nan", "gate_init=inf"]
)
def test_sizes_that_no_model_has_get_a_sentence(override):
    name, _, value = override.partition("=")
    with pytest.raises(ValueError, match=rf"^{override} must be "):
        InfiniGPTNeoConfig(**{name: float(value) if name == "gate_init" else int(value)})


@pytest.mark.parametrize("output", ["a-file", "/proc/nothing"])
def test_a_folder_that_cannot_be_written_gets_a_sentence(output, tmp_path):
    (tmp_path / "a-file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(.*\): choose another output folder"):
        acquire_run_lock(load_recipe(None, ["batch.rows=4", f"output={tmp_path / output}"]).folder)


def test_two_jobs_in_one_folder_are_refused(tmp_path):
    job = """
import sys
from pathlib import Path
from infini_ds.utils import run_lock
run_lock.TIMEOUT = 0.5
run_lock.acquire_run_lock(Path(sys.argv[1], "one"))
"""
    held = acquire_run_lock(tmp_path / "one")
    assert f"another job is training in {tmp_path}/one" in run_script("-c", job, tmp_path, code=1).stderr
    held.close()
    run_script("-c", job, tmp_path)
