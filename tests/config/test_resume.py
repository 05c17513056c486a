"""What a resumed run may change: keys that do not change its results; runs of earlier versions resume."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from infini_ds.config.keys import list_keys
from infini_ds.config.recipe import RECIPE_FILE, Recipe, load_recipe
from infini_ds.config.resume import check_same_run
from infini_ds.utils.errors import UserError

EARLIER = Path(__file__).with_name("recipe_of_an_earlier_run.yaml")
DATA = {"batch.rows": 2, "data.seed": 0, "streams": [{"shards": "9214", "proportion": None, "repeat": None}]}
CHANGES = {
    "seed": 1, "precision": "bf16", "data.seed": 1, "batch.tokens": 512, "batch.rows": 4, "optimizer.learning_rate": 1,
    "optimizer.gate_learning_rate": 1, "optimizer.weight_decay": 1, "optimizer.beta1": 0, "optimizer.beta2": 0,
    "optimizer.eps": 1, "optimizer.gradient_clipping": 0, "optimizer.kind": "muon", "optimizer.muon_momentum": 0,
    "optimizer.muon_learning_rate": 1, "model.preset": "33m", "model.start_from": "x",
    "model.segment_length": 32, "model.memory_rule": "delta", "model.position_embedding": "rotary",
    "model.gate_init": 1, "model.short_conv": 2, "model.embed_conv": 2, "model.truncate_blocks": 1,
}  # fmt: skip
OTHER = {
    "name": "x", "output": "x", "steps": 2000, "deepspeed": "auto", "resume": "false", "log_every": 1,
    "timeout_minutes": 1, "model.segments_per_block": "auto", "model.gradient_checkpointing": "true",
    "model.checkpoint_layers": "true", "model.offload_states": "true", "model.attention": "flex_attention",
    "model.compile": "true", "data.path": "x", "data.cache": "x", "data.cache_limit": "1GB", "data.workers": 1,
    "batch.micro_rows": 1, "schedule.kind": "constant", "schedule.warmup_steps": 1, "schedule.final_ratio": 1,
    "schedule.gates": "constant", "validation.every": 1, "validation.rows": 1, "checkpoint.every": 1,
    "checkpoint.keep_last": 1, "checkpoint.keep_every": 1, "checkpoint.keep_best": "true",
    "stability.max_rollbacks": 1, "stability.check_gradients": "true", "plan.gpu": "x", "plan.memory": 1,
    "data.curriculum": "[{path: x, steps: 3}, {path: y}]", "validation.recall": "pairs",
    "validation.recall_examples": 1,
}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that the version before this layout of recipes began."""
    folder = tmp_path / "tiny-cpu"
    folder.mkdir()
    shutil.copy(EARLIER, folder / RECIPE_FILE)
    (folder / "data_manifest.json").write_text(json.dumps({"fingerprint": DATA, "streams": []}))
    return folder


def same_recipe(run: Path, *overrides: str) -> Recipe:
    return load_recipe(EARLIER.with_name("recipe_of_version_0_1.yaml"), [f"output={run.parent}", *overrides])


def test_an_earlier_run_resumes_with_its_recipe(run):
    check_same_run(same_recipe(run), DATA)
    check_same_run(load_recipe(run / RECIPE_FILE, [f"output={run.parent}"]), DATA)


def test_a_run_of_this_version_resumes_with_its_recipe(run):
    recipe = same_recipe(run, "data.streams=[{path: a, repeat: 2}]", "model.config.hidden_size=64")
    (run / RECIPE_FILE).write_text(recipe.to_yaml())
    check_same_run(recipe, DATA)


def test_each_key_has_been_decided():
    fixed = {key.name for key in list_keys(Recipe) if not key.resumable}
    assert fixed == {*CHANGES, "model.config"}
    assert {*OTHER} <= {key.name for key in list_keys(Recipe) if key.resumable}


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_that_changes_the_results_may_not_change(key, run):
    others = {"batch.tokens": ["batch.rows=null"], "optimizer.kind": ["optimizer.gradient_clipping=0"]}
    overrides = others.get(key, [])
    with pytest.raises(UserError, match=rf"^{'batch.(tokens|rows)' if 'batch' in key else key}=.*was begun with "):
        check_same_run(same_recipe(run, *overrides, f"{key}={CHANGES[key]}"), DATA)


@pytest.mark.parametrize("key", OTHER)
def test_a_key_that_does_not_change_the_results_may_change(key, run):
    recipe = same_recipe(run, f"{key}={OTHER[key]}")
    if key in ("name", "output"):
        run.parent.joinpath(recipe.folder).mkdir(parents=True)
        recipe = recipe.model_copy(update={"output": str(run.parent), "name": f"{recipe.name}-moved"})
        shutil.copytree(run, recipe.folder)
    check_same_run(recipe, DATA)


def test_the_sentence_names_both_values_and_the_remedies(run):
    with pytest.raises(UserError) as error:
        check_same_run(same_recipe(run, "optimizer.beta2=0.99"), DATA)
    assert str(error.value) == (
        f"optimizer.beta2=0.99, but the run in {run} was begun with optimizer.beta2=0.95: choose another name=, or "
        "give optimizer.beta2=0.95 to resume it"
    )
    with pytest.raises(UserError, match=r"model.segment_length=null, .* begun with model.segment_length=64"):
        check_same_run(same_recipe(run, "model.segment_length=null"), DATA)
    with pytest.raises(
        UserError, match=r"resid_dropout=0.1, .*=the default: .* or leave model.config.resid_dropout out"
    ):
        check_same_run(same_recipe(run, "model.config.resid_dropout=0.1"), DATA)


def test_other_data_is_refused(run):
    streams = [{**DATA["streams"][0], "shards": "0000"}]
    with pytest.raises(UserError, match="choose another name="):
        check_same_run(same_recipe(run), DATA | {"streams": streams})
    (run / "data_manifest.json").write_text(json.dumps({"streams": []}))  # the earliest runs have no fingerprint
    check_same_run(same_recipe(run), DATA | {"streams": streams})


def test_a_recipe_that_this_version_cannot_read_is_refused_with_the_reason(run):
    begun = yaml.safe_load(EARLIER.read_text())
    for change, words in [({"wings": 2}, "unknown key wings"), ({"precision": "fp8"}, "precision=fp8")]:
        (run / RECIPE_FILE).write_text(yaml.safe_dump(begun | change))
        with pytest.raises(UserError, match=f"{words}.*begun with another version of infini_ds .* another name="):
            check_same_run(same_recipe(run), DATA)
