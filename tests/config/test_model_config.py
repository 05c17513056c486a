"""The model's configuration, from recipe and tokenizer."""

import json
from pathlib import Path

import pytest
from harness import SHAPE

from data_prep.tokenizer import TokenizerInfo
from infini_ds.config.model_config import block_schedule, check_vocabulary, model_config
from infini_ds.config.recipe import Recipe, load_recipe
from infini_ds.model import BlockSchedule
from infini_ds.model.presets import preset_config
from infini_ds.utils.errors import UserError


class Data:
    """What model_config reads of the manifest of prepared data."""

    tokenizer = TokenizerInfo("trained", vocab_size=512, start_id=7, pad_id=1, sha256="0")


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ["batch.rows=1", *overrides])


@pytest.fixture
def start(tmp_path) -> Path:
    """An exported model's folder, without its weights."""
    folder = tmp_path / "infini"
    preset_config("tiny", hidden_size=32, vocab_size=600, segment_length=64).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    return folder


def test_preset_overrides_and_vocabulary():
    config = model_config(recipe(*SHAPE, "model.memory_rule=delta", "model.gate_init=-1"), Data)
    assert (config.hidden_size, config.segment_length, config.memory_rule, config.gate_init) == (32, 32, "delta", -1.0)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (512, 7, 7, 1)
    assert [model_config(recipe(f"model.short_conv={width}"), None).short_conv for width in (0, 2, "null")] == [0, 2, 0]
    assert model_config(recipe("model.preset=125m"), None).vocab_size == 50257


def test_start_from_decides_the_shape(start):
    config = model_config(recipe(f"model.start_from={start}", "model.segment_length=128"), Data)
    assert (config.hidden_size, config.vocab_size, config.segment_length) == (32, 600, 128)
    assert model_config(recipe(f"model.start_from={start}"), None).segment_length == 64


@pytest.mark.parametrize("key", ["short_conv", "embed_conv"])
def test_start_from_decides_a_convolution_that_it_has(start, key):
    def width_of(*given: str) -> int:
        return getattr(model_config(recipe(f"model.start_from={start}", *given), None), key)

    assert width_of(f"model.{key}=3") == 3
    config = json.loads((start / "config.json").read_text())
    for width in (0, None):  # None: of a version that did not have it
        (start / "config.json").write_text(json.dumps(config | {key: width}))
        if width is None:
            (start / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        assert width_of(f"model.{key}=2") == 2
    (start / "config.json").write_text(json.dumps(config | {key: 2}))
    for given in ((), (f"model.{key}=2",)):
        assert width_of(*given) == 2
    for width in (0, 3):
        with pytest.raises(UserError, match=rf"model.{key}={width} is decided by the weights.*width 2: leave it"):
            width_of(f"model.{key}={width}")


def test_block_schedule():
    asked = ["model.checkpoint_layers=true", "model.offload_states=true", "model.truncate_blocks=2"]
    assert block_schedule(recipe(*asked, "model.segments_per_block=4")) == BlockSchedule(4, True, True, 2)
    assert block_schedule(recipe("model.segments_per_block=auto")) == BlockSchedule()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.preset=tinny"], ["model.preset='tinny'", "study-9m"]),
        (["model.memory_rule=deltoid"], ["model.memory_rule=", "deltoid", "delta"]),
        (["model.short_conv=1"], ["model.short_conv=1 is no width", "give 2"]),
        (["model.embed_conv=1"], ["model.embed_conv=1 is no width", "give 2"]),
        (["model.segment_length=1024"], ["model.segment_length=1024", "max_position_embeddings"]),
        (
            ["model.config.hiden_size=4"],
            ["unknown key model.config.hiden_size", "did you mean model.config.hidden_size?"],
        ),
        (["model.config.zzz=4"], ["unknown key model.config.zzz", "not a field"]),
        (["model.config.window_size=null"], ["model.config.window_size=null must be an integer, such as 256"]),
        (["model.config.num_heads=two"], ["model.config.num_heads=two must be an integer, such as"]),
        (["model.config.use_cache=1"], ["model.config.use_cache=1 must be true or false, such as true"]),
        (["model.config.num_heads=0"], ["model.config.num_heads=0 must be at least 1"]),
        (["model.config.num_heads=5"], ["hidden_size=128", "num_heads=5"]),
        (["model.config.vocab_size=100"], ["100 embeddings", "512 tokens", "--tokenizer"]),
        (["model.attention=flex_attention", "model.config.attention_dropout=0.1"], ["attention_dropout=0.1", "sdpa"]),
        (["model.start_from=/nowhere"], ["model.start_from=/nowhere", "config.json"]),
    ],
)
def test_mistakes_get_a_sentence(overrides, words):
    with pytest.raises(UserError) as error:
        model_config(recipe(*overrides), Data)
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.config.hidden_size=64", ["model.config.hidden_size is given", "leave out one of the two"]),
        ("model.gate_init=0", ["model.gate_init=0.0 is decided by the weights", "leave it out"]),
        ("model.position_embedding=rotary", ["model.position_embedding=rotary is decided by the weights"]),
        ("model.segment_length=4096", ["model.segment_length=4096", "max_position_embeddings"]),
    ],
)
def test_what_start_from_decides_is_refused(override, words, start):
    with pytest.raises(UserError) as error:
        model_config(recipe(f"model.start_from={start}", override), Data)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_model_without_memory_and_another_tokenizer_are_refused(start, tmp_path):
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    tuned = recipe(f"model.start_from={start}")
    check_vocabulary(tuned, tmp_path / "data" / "tokenizer")
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 0}}}))
    with pytest.raises(UserError, match=f"have different tokenizers: prepare the data with --tokenizer {start}"):
        check_vocabulary(tuned, tmp_path / "data" / "tokenizer")
    check_vocabulary(recipe(), tmp_path / "data" / "tokenizer")
    (start / "config.json").write_text('{"model_type": "gpt_neo"}')
    with pytest.raises(UserError, match="is a gpt_neo model, which has no memory"):
        model_config(tuned, None)
