"""The block schedule: what it must not change, that it is not exported, and the bound on long prompts."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TINY, gradients, random_ids, tiny_model
from strategies import batches
from torch.testing import assert_close

from infini_ds.model import (
    BlockSchedule,
    InfiniGPTNeoConfig,
    InfiniGPTNeoForCausalLM,
    InfiniGPTNeoForSequenceClassification,
    InfiniGPTNeoModel,
)
from infini_ds.model.block_schedule import MAX_BLOCK_TOKENS

few = settings(deadline=None, max_examples=25, derandomize=True)
exact = {"rtol": 1e-9, "atol": 1e-11}
SCHEDULE = {"segments_per_block": 2, "checkpoint_layers": True, "offload_states": True, "truncate_blocks": None}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"segments_per_block": 0}, "segments_per_block=0 must be at least 1, or None for all segments at once"),
        ({"truncate_blocks": 0}, "truncate_blocks=0 must be at least 1, or None for exact gradients"),
    ],
)
def test_a_value_out_of_range_is_rejected(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        BlockSchedule(**fields)


@pytest.mark.parametrize("cls", [InfiniGPTNeoModel, InfiniGPTNeoForCausalLM, InfiniGPTNeoForSequenceClassification])
def test_every_model_class_has_a_schedule(cls):
    model = cls(InfiniGPTNeoConfig(**TINY))
    assert model.block_schedule == BlockSchedule()
    model.block_schedule = BlockSchedule(segments_per_block=3)
    assert model.block_schedule == getattr(model, "transformer", model).block_schedule == BlockSchedule(3)


def test_the_schedule_is_not_exported(tmp_path):
    tiny_model(dtype=torch.float32, segments_per_block=3).save_pretrained(tmp_path)
    assert not SCHEDULE.keys() & json.loads((tmp_path / "config.json").read_text()).keys()
    assert InfiniGPTNeoForCausalLM.from_pretrained(tmp_path).block_schedule == BlockSchedule()


def test_a_folder_of_an_earlier_version_loads(tmp_path):
    """Its config.json holds the schedule's four fields."""
    model, ids = tiny_model(dtype=torch.float32), random_ids(2, 11)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SCHEDULE))
    config = InfiniGPTNeoConfig.from_pretrained(tmp_path)
    assert not SCHEDULE.keys() & config.to_dict().keys()
    loaded = InfiniGPTNeoForCausalLM.from_pretrained(tmp_path)
    assert loaded.block_schedule == BlockSchedule()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", SCHEDULE)
def test_the_configuration_rejects_a_schedule_given_in_code(name, tmp_path):
    sentence = rf"{name}={SCHEDULE[name]} is not a field of InfiniGPTNeoConfig: set .*BlockSchedule\({name}="
    with pytest.raises(ValueError, match=sentence):
        InfiniGPTNeoConfig(**TINY, **{name: SCHEDULE[name]})
    InfiniGPTNeoConfig(**TINY).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        InfiniGPTNeoConfig.from_pretrained(tmp_path, **{name: SCHEDULE[name]})


def block_tokens(model: InfiniGPTNeoForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each block that the model computes from now on adds its number of tokens in a row."""
    computed, block = [], model.transformer.forward_block

    def counted(embeds, *args):
        computed.append(embeds.shape[1])
        return block(embeds, *args)

    monkeypatch.setattr(model.transformer, "forward_block", counted)
    return computed


def test_an_exported_model_reads_a_long_prompt_in_blocks(tmp_path, monkeypatch):
    tiny_model(dtype=torch.float32, max_position_embeddings=64, segment_length=48).save_pretrained(tmp_path)
    model = InfiniGPTNeoForCausalLM.from_pretrained(tmp_path)
    computed, length = block_tokens(model, monkeypatch), 2 * MAX_BLOCK_TOKENS + 1000
    ids = random_ids(1, length)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    prompt, tokens = computed[:-2], computed[-2:]
    assert sum(prompt) == -(-length // 48) * 48 and tokens == [1, 1]
    assert MAX_BLOCK_TOKENS - 48 < max(prompt) <= MAX_BLOCK_TOKENS


def test_a_segment_longer_than_the_bound_is_one_block(monkeypatch):
    monkeypatch.setattr("infini_ds.model.block_schedule.MAX_BLOCK_TOKENS", 3)
    model = tiny_model(segment_length=4)
    computed = block_tokens(model, monkeypatch)
    model(random_ids(1, 11))
    assert computed == [4, 4, 4]


def test_training_computes_all_segments_at_once_unless_the_schedule_bounds_them(monkeypatch):
    monkeypatch.setattr("infini_ds.model.block_schedule.MAX_BLOCK_TOKENS", 8)
    model, ids = tiny_model(segment_length=4).train(), random_ids(2, 24)
    computed = block_tokens(model, monkeypatch)
    for mode, schedule, expected in (
        (True, BlockSchedule(), [24]),
        (True, BlockSchedule(3), [12, 12]),
        (False, BlockSchedule(), [8, 8, 8]),
        (False, BlockSchedule(6), [24]),
    ):
        model.train(mode).block_schedule = schedule
        computed.clear()
        model(ids, labels=ids)
        assert computed == expected


@given(batches(), st.sampled_from([None, 1, 2, 5]), st.booleans(), st.booleans(), st.booleans())
@few
def test_no_schedule_changes_loss_or_gradient(batch, segments_per_block, checkpointing, layers, offload):
    model, ids, mask, documents = batch
    model.train()
    want = model(ids, mask, documents, labels=ids, loss_reduction="sum").loss
    want_gradients = gradients(want, model)
    model.block_schedule = BlockSchedule(segments_per_block, layers, offload)
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss = model(ids, mask, documents, labels=ids, loss_reduction="sum").loss
    assert_close(loss, want, **exact)
    assert_close(gradients(loss, model), want_gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("truncate_blocks", [1, 2, 3])
def test_truncated_gradients_equal_those_after_a_cache(truncate_blocks, checkpointing):
    """The last block's loss has the gradient that it has after a cache of the text before the cut."""
    S, G, blocks = 4, 2, 4
    model, ids = tiny_model(segment_length=S, segments_per_block=G).train(), random_ids(2, blocks * G * S)
    cut = (blocks - 1) // truncate_blocks * truncate_blocks * G * S
    labels = ids.clone()
    labels[:, : 1 - G * S] = -100  # predictions inside the last block only
    with torch.no_grad():
        cache = model(ids[:, :cut], use_cache=True).past_key_values
    want = model(ids[:, cut:], past_key_values=cache, labels=labels[:, cut:], loss_reduction="sum").loss
    want = gradients(want, model)
    exact_gradients = gradients(model(ids, labels=labels, loss_reduction="sum").loss, model)
    model.block_schedule = BlockSchedule(G, truncate_blocks=truncate_blocks)
    model.transformer.gradient_checkpointing = checkpointing
    got = gradients(model(ids, labels=labels, loss_reduction="sum").loss, model)
    assert_close(got, want, **exact)
    assert any((got[name] - exact_gradients[name]).abs().max() > 1e-6 for name in got)
