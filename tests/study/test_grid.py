"""What a study file expands to, and which mistakes in it are refused."""

import pytest
import torch
from harness import ROOT

from data_prep.__main__ import parse
from infini_ds.config.keys import list_keys
from infini_ds.config.model_config import model_config
from infini_ds.config.recipe import load_recipe
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.study.commands import Scripts, StudyCommands
from infini_ds.study.grid import expand, flatten, other_axes
from infini_ds.study.study_config import Study, load_study
from infini_ds.utils.errors import UserError

STUDIES = sorted((ROOT / "launch" / "studies").glob("*.yaml"))
SMALL = "launch/studies/small.yaml"
NO_SCRIPTS = Scripts(*[ROOT / "none.py"] * 3)


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_study_is_valid(path):
    study = load_study(path)
    runs = expand(study)
    assert study.name == path.stem and [run.number for run in runs] == list(range(1, len(runs) + 1))
    data = StudyCommands(study, NO_SCRIPTS).prepare_data(runs)
    assert [parse(list(command.arguments[3:])).sequence_length for command in data] == list(
        dict.fromkeys(run.context_length for run in runs)
    )


@pytest.mark.parametrize("name", ["small", "full"])
def test_the_study_that_is_replicated(name):
    runs = expand(load_study(f"launch/studies/{name}.yaml"))
    for arm in ("pretrain", "finetune"):
        of_arm = [run for run in runs if run.arm == arm and run.uses_memory]
        assert len({run.recipe.seed for run in of_arm}) >= 2 and len({run.segment_length for run in of_arm}) >= 2
    assert {run.gate_schedule for run in runs} == {"decayed", "constant"}
    assert {run.memory_rule for run in runs} == {"linear", "delta"}
    assert len({run.context_length for run in runs}) >= 2


def test_arms_of_the_memory_study_differ_by_their_attention_alone():
    """The same learning rates, seeds and steps; and parameters, but for those of the softmax rule's own parts."""
    grids: dict[str, list] = {}
    sizes: dict[str, int] = {}
    for run in expand(load_study("launch/studies/memory.yaml")):
        recipe = run.recipe
        fixed = (recipe.optimizer.muon_learning_rate, recipe.seed, recipe.steps, recipe.batch, recipe.schedule)
        grids.setdefault(run.arm, []).append(fixed)
        with torch.device("meta"):
            model = InfiniGPTNeoForCausalLM(model_config(recipe, None))
        sizes[run.arm] = sum(p.numel() for p in model.parameters())
    assert list(grids) == ["local", "linear", "softmax", "full"]
    assert all(grid == grids["local"] for grid in grids.values()) and len(grids["local"]) == 5
    assert sizes["local"] == sizes["linear"] == sizes["full"] < sizes["softmax"] < 1.001 * sizes["local"]


def test_fine_tuning_starts_from_a_plain_run_with_its_seed():
    """And pre-training sees as many tokens as both together."""
    runs = expand(load_study(SMALL))
    finetuned = [run for run in runs if run.arm == "finetune"]
    pretrained = [run for run in runs if run.arm == "pretrain"]
    for run in finetuned:
        assert not run.start.uses_memory and run.start.recipe.seed == run.recipe.seed and run.start.number < run.number
        assert f"model.start_from={run.start.export}" in run.overrides
        assert run.recipe.data.seed != run.start.recipe.data.seed
        assert run.evaluated_steps[0] == 0 and run.evaluated_steps[-1] == run.recipe.steps
        assert all(run.recipe.steps + run.start.recipe.steps == other.recipe.steps for other in pretrained)
    assert {run.recipe.batch.tokens for run in runs} == {4096}
    for run in (runs[0], finetuned[0], pretrained[-1]):
        assert load_recipe(run.config, list(run.overrides)) == run.recipe


def test_a_combination_of_two_products_is_one_run():
    override = "arms.finetune.grid=[{data.seed: [4, 5], seed: [0]}, {seed: [0], data.seed: [4]}]"
    assert sum(run.arm == "finetune" for run in expand(load_study(SMALL, [override]))) == 2


def test_the_width_of_the_short_convolution_is_an_axis():
    """Of runs from scratch, and of fine-tuning, which adds it."""
    grid = "[{model.segment_length: [32], model.short_conv: [0, 2], seed: [0]}]"
    study = load_study(SMALL, [f"arms.pretrain.grid={grid}", f"arms.finetune.grid={grid}"])
    runs = [run for run in expand(study) if run.arm in ("pretrain", "finetune")]
    assert [run.recipe.model.short_conv for run in runs] == [0, 2, 0, 2] and other_axes(study) == ["model.short_conv"]
    assert [run.name.split("-")[-2] for run in runs] == ["short_conv0", "short_conv2"] * 2
    assert all(run.start is None or run.start.recipe.model.short_conv is None for run in runs)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("nme=x", ["nme", "did you mean name?"]),
        ("armz=1", ["armz", "did you mean arms?"]),
        ("name=a/b", ["name=a/b", "output="]),
        ("data.sourcee=x", ["data.sourcee", "did you mean data.source?"]),
        ("config=none.yaml", ["none.yaml does not exist", "launch/recipes/study.yaml"]),
        ("recipe.stepz=3", ["arm base", "stepz", "did you mean steps?"]),
        ("recipe.name=x", ["name is set by the study"]),
        ("arms.finetune.start_from=bas", ["arms.finetune.start_from=bas is not an arm", "did you mean base?"]),
        ("arms.base.start_from=finetune", ["arms.base.start_from=finetune", "circle"]),
        ("arms.finetune.grd=[]", ["grd", "did you mean arms.finetune.grid?"]),
        ("arms.finetune.grid=[{model.segmnt_length: [3]}]", ["model.segmnt_length", "model.segment_length"]),
        ("arms.finetune.grid=[{seed: 3}]", ["seed=3", "list of values"]),
        ("arms.finetune.grid=[{seed: [7]}]", ["no run of arm base", "seed=7"]),
        ("evaluation.along=[blimp, gleu]", ["evaluation.along: gleu is not a task", "did you mean glue?"]),
        ("context_length=1", ["context_length=1", "at least 2"]),
        ("arms.finetune.grid=[]", ["arms.finetune.grid is empty"]),
        ("arms.finetune.grid=[{model.segment_length: [1024], seed: [0]}]", ["1024 is longer than a row of 512"]),
        ("arms.finetune.grid=[{context_length: [x], seed: [0]}]", ["context_length=x", "number of tokens"]),
        ("arms.base.grid=[{seed: [0, 1], model.preset: [tiny, 33m]}]", ["no run of arm base", "model.preset=None"]),
    ],
)
def test_mistakes_get_a_sentence(override, words):
    with pytest.raises(UserError) as error:
        expand(load_study(SMALL, [override]))
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_the_document_lists_every_key():
    text = (ROOT / "docs" / "study.md").read_text()
    names = [key.name.removeprefix("arms[i].") for key in list_keys(Study, elements=True)]
    assert all(f"`{name}`" in text for name in names) and "evaluation.along" in names and "start_from" in names


def test_flatten_joins_keys_with_dots():
    assert flatten({"a": {"b": 1}, "c": 2}) == {"a.b": 1, "c": 2}
