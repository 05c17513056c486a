"""DeepSpeed's JSON: each shipped file is sound, each mistake gets its sentence."""

import json

import pytest
from harness import ROOT

from infini_ds.config.batch_shape import batch_shape
from infini_ds.config.deepspeed_config import (
    ELSEWHERE,
    FOLDER,
    KNOWN_KEYS,
    KNOWN_KEYS_OF_GROUPS,
    deepspeed_config,
    default_file,
)
from infini_ds.config.recipe import load_recipe
from infini_ds.utils.errors import UserError

FILES = sorted((ROOT / "ds_configs").glob("*.json"))


def test_all_files_are_shipped():
    names = {"zero2", "zero2_cpu", "zero2_nodes", "zero2_offload", "zero2_one_gpu"}
    assert {path.stem for path in FILES} == names
    assert default_file("cuda") == FOLDER / "zero2.json" and default_file("cpu") == FOLDER / "zero2_cpu.json"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
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
    ("change", "words"),
    [
        ({"zero_optimisation": {}}, ["unknown key zero_optimisation", "did you mean zero_optimization?"]),
        ({"zzz": 1}, ["unknown key zzz", "known are aio, bf16"]),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            ['offload_optimizer="cpu"', "is not an object"],
        ),
        ({"fp16": {"enabled": True}}, ["fp16 in deepspeed=", "bf16 or fp32, by precision="]),
        ({"bfloat16": {}}, ["bfloat16 in deepspeed=", "write that"]),
        ({"optimizer": {"type": "AdamW"}}, ["optimizer in deepspeed=", "optimizer.learning_rate"]),
        ({"scheduler": {}}, ["scheduler in deepspeed=", "schedule.kind"]),
        ({"activation_checkpointing": {}}, ["model.gradient_checkpointing"]),
        ({"tensor_parallel": {}}, ["tensor_parallel in deepspeed=", "this project does not support it"]),
        ({"gradient_cliping": 1}, ["unknown key gradient_cliping", "did you mean gradient_clipping?"]),
        ({"zero_optimization": {"stage": 2, "overlap_com": 1}}, ["did you mean zero_optimization.overlap_comm?"]),
        ({"zero_optimization": {"stage": 2, "zzz": 1}}, ["unknown key zero_optimization.zzz", "known are allgather_"]),
        ({"bf16": {"enable": False}}, ["unknown key bf16.enable ", "did you mean bf16.enabled?"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage=3", "stage 1 or 2"]),
        ({"zero_optimization": {}}, ["zero_optimization.stage=null", "stage 1 or 2"]),
        ({"zero_optimization": 2}, ["not an object"]),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, ["compute_grad_norm=false", "leave it out"]),
        ({"train_batch_size": 5}, ["train_batch_size=5", "contradicts the recipe, by which it is 4", "auto"]),
        ({"checkpoint": {"writer": {"decoupled": True}}}, ["checkpoint=", "decoupled", "leave it out"]),
        ({"gradient_clipping": 9.0}, ["gradient_clipping=9.0", "auto"]),
        ({"bf16": {"enabled": True}}, ['bf16={"enabled": true}', "contradicts precision=fp32"]),
        ({"bf16": True}, ["bf16=true", "contradicts precision=fp32"]),
    ],
)
def test_mistakes_get_a_sentence(change, words, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(json.loads(default_file("cpu").read_text()) | change))
    recipe = load_recipe(None, ["batch.rows=4"])
    with pytest.raises(UserError) as error:
        deepspeed_config(file, recipe, batch_shape(recipe.batch, 256, 1), "fp32")
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in [*words, str(file)]), sentence


@pytest.mark.parametrize("text", ["{", "[]", '"zero"', "\udcff{}"])
def test_a_file_that_is_no_json_object_gets_a_sentence(text, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(text, errors="surrogateescape")
    recipe = load_recipe(None, ["batch.rows=4"])
    with pytest.raises(UserError, match=r"is not (JSON|an object)"):
        deepspeed_config(file, recipe, batch_shape(recipe.batch, 256, 1), "fp32")


def test_known_keys_of_groups_are_those_that_deepspeed_declares():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for group, declared in (("zero_optimization", DeepSpeedZeroConfig), ("bf16", DeepSpeedBF16Config)):
        names = {name for key, field in declared.model_fields.items() for name in (key, field.alias) if name}
        assert KNOWN_KEYS_OF_GROUPS[group] == names


def test_what_has_another_place_is_not_called_unknown_or_misspelled():
    assert not KNOWN_KEYS & set(ELSEWHERE)
    assert all(sentence.endswith(("leave it out", "write that")) for sentence in ELSEWHERE.values())
