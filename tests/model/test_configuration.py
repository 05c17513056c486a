"""The configuration: errors, round trips, presets, and the files that an export carries."""

import json
from pathlib import Path

import pytest
import torch
from reference import TINY, random_ids, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import infini_ds.model
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM, InfiniGPTNeoModel
from infini_ds.model.presets import PRESETS, preset_config

FOLDER = Path(infini_ds.model.__file__).parent


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"segment_length": 0}, "segment_length=0 must be at least 1 token"),
        ({"memory_rule": "hebb"}, "memory_rule='hebb' is not one of"),
        ({"position_embedding": "alibi"}, "position_embedding='alibi' is not one of segment, rotary"),
        (
            {"segment_length": 33},
            "segment_length=33 is more than max_position_embeddings=32: shorten the segment, or set "
            "position_embedding=rotary",
        ),
        ({"hidden_size": 9}, "hidden_size=9 is not divisible by num_heads=2"),
        ({"hidden_size": 6, "position_embedding": "rotary"}, "needs an even head size, this one is 3"),
    ],
)
def test_configuration_errors_name_field_value_and_remedy(fields, sentence):
    with pytest.raises(ValueError) as error:
        InfiniGPTNeoConfig(**(TINY | fields))
    assert sentence in str(error.value)


def test_a_rotary_segment_may_exceed_max_position_embeddings():
    model = tiny_model(position_embedding="rotary", segment_length=40)
    assert model(random_ids(1, 81)).logits.shape[1] == 81
    assert not any("wpe" in name for name in model.state_dict())


def test_a_configuration_is_saved_and_loaded_unchanged(tmp_path):
    fields = {
        "segment_length": 24,
        "position_embedding": "rotary",
        "gate_init": -2.5,
        "rotary_base": 500.0,
        "memory_rule": "linear",
    }
    config = InfiniGPTNeoConfig(**(TINY | fields))
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "infini_gpt_neo"
    for again in (InfiniGPTNeoConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is InfiniGPTNeoConfig
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
        assert {name: getattr(again, name) for name in fields} == fields
        assert again.attention_layers == ["global", "local"]


def test_auto_classes_know_the_model():
    config = AutoConfig.for_model("infini_gpt_neo", **TINY)
    assert type(config) is InfiniGPTNeoConfig
    assert type(AutoModelForCausalLM.from_config(config)) is InfiniGPTNeoForCausalLM
    assert type(AutoModel.from_config(config)) is InfiniGPTNeoModel


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_a_model(name):
    config = preset_config(name, segment_length=64)
    assert config.segment_length == 64
    assert len(config.attention_layers) == config.num_layers
    with torch.device("meta"):
        assert sum(p.numel() for p in InfiniGPTNeoForCausalLM(config).parameters()) > 1e6


def test_an_unknown_preset_is_rejected():
    with pytest.raises(ValueError, match=r"preset='huge' is not one of tiny"):
        preset_config("huge")


def direct_imports(name: str) -> set[str]:
    return {f"{module}.py" for module in get_relative_imports(FOLDER / name)}


@pytest.mark.parametrize("name", ["configuration.py", "modeling.py"])
def test_transformers_copies_every_file_that_an_export_needs(name):
    """Loading an exported folder, transformers 4 copies the files that configuration.py, and then modeling.py, imports
    directly, not what these import in turn.
    """
    needed = {Path(file).name for file in get_relative_import_files(str(FOLDER / name))}
    copied = direct_imports("configuration.py") | {"configuration.py"}
    if name == "modeling.py":
        copied |= direct_imports("modeling.py")
    assert needed <= copied
