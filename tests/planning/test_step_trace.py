"""Traces on fake tensors: what is extrapolated is what runs in full, and live bytes are what real tensors take."""

from dataclasses import replace

import gated_decay  # noqa: F401  registers its memory rule
import pytest
import torch

from infini_ds.model import BlockSchedule
from infini_ds.model.presets import preset_config
from infini_ds.planning import step_trace
from infini_ds.planning.live_bytes import LiveBytes
from infini_ds.planning.step_trace import MicroBatch, deepen, parameter_sizes, run_on_fake_tensors, trace


def micro_batch(rows=1, tokens=192, precision="fp32", packed=True, checkpointing=True, schedule=None, **fields):
    shape = {"hidden_size": 64, "num_heads": 2, "max_position_embeddings": 64, "window_size": 16, "vocab_size": 512}
    config = preset_config("tiny", **(shape | {"segment_length": 32} | fields))
    schedule = BlockSchedule(segments_per_block=2) if schedule is None else schedule
    return MicroBatch(
        config.to_json_string(use_diff=False), "sdpa", rows, tokens, precision, schedule, packed, checkpointing
    )


DEEP = {
    "checkpointing": {},
    "an odd number of layers": {"num_layers": 7},
    "one block, so short that gradients outweigh activations": {"tokens": 20},
    "layers": {"schedule": BlockSchedule(segments_per_block=2, checkpoint_layers=True)},
    "activations kept": {"checkpointing": False},
    "activations kept, rows": {"checkpointing": False, "packed": False, "rows": 3},
    "bf16, delta rule": {"precision": "bf16", "memory_rule": "delta"},
    "rotary, gated decay": {"position_embedding": "rotary", "memory_rule": "gated_decay"},
    "dropout": {"resid_dropout": 0.1, "embed_dropout": 0.1, "attention_dropout": 0.1},
    "short convolution": {"short_conv": 2},
    "convolution of embeddings": {"embed_conv": 8},
    "layers of one kind": {"attention_types": [[["global"], 6]]},
    "layers in threes": {"num_layers": 9, "attention_types": [[["local", "local", "global"], 3]]},
}


def in_order(found):
    return sorted(found.reducing, key=lambda reading: (reading.taken, reading.elements > 0, reading.live))


@pytest.mark.parametrize("name", DEEP)
def test_layers_are_extrapolated_exactly(name, monkeypatch):
    step = micro_batch(**({"num_layers": 6} | DEEP[name]))
    found = trace(step)
    monkeypatch.setattr(step_trace, "_period", lambda kinds: len(kinds))  # so that all layers run
    trace.cache_clear()
    in_full = trace(step)
    trace.cache_clear()
    assert found.computing == in_full.computing and found.states == in_full.states
    for reading, expected in zip(in_order(found), in_order(in_full), strict=True):
        assert reading._replace(live=0, gradients=0) == expected._replace(live=0, gradients=0)
        # The first layer may differ by the gradient of a bias or a norm.
        assert reading.live == pytest.approx(expected.live, rel=0.001)


def test_what_is_not_affine_would_be_noticed():
    """The rule of the test above, with readings of a model in which the last layer differs from the others."""
    shallow, deep = (run_on_fake_tensors(micro_batch(num_layers=layers))[0] for layers in (2, 4))
    wrong = {label: reading._replace(live=reading.live + (label.layer == 3) * 1e6) for label, reading in deep.items()}
    right = max(reading.live for reading in deepen(shallow, deep, 2, 8).values())
    assert max(reading.live for reading in deepen(shallow, wrong, 2, 8).values()) > right + 1e6


BLOCKS = {
    "checkpointing": {"tokens": 32 * 9 + 5},
    "blocks of one segment": {"tokens": 32 * 9 + 5, "schedule": BlockSchedule(segments_per_block=1)},
    "last block full": {"tokens": 32 * 10, "packed": False},
    "delta rule": {"tokens": 32 * 9 + 5, "memory_rule": "delta", "rows": 3},
    "activations kept": {"tokens": 32 * 13 + 5, "checkpointing": False},
    "activations kept, short convolution": {"tokens": 32 * 13 + 5, "checkpointing": False, "short_conv": 3},
    "convolution of embeddings": {"tokens": 32 * 9 + 5, "embed_conv": 8},
    "activations kept, convolution of embeddings": {"tokens": 32 * 13 + 5, "checkpointing": False, "embed_conv": 3},
    "activations kept, gated decay": {"tokens": 32 * 13 + 5, "checkpointing": False, "memory_rule": "gated_decay"},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_extrapolated(name, monkeypatch):
    step = micro_batch(num_layers=2, **BLOCKS[name])
    found = trace(step)
    monkeypatch.setattr(step_trace, "CHECKPOINTED_BLOCKS", 100)
    monkeypatch.setattr(step_trace, "KEPT_BLOCKS", 100)
    trace.cache_clear()
    blocks = -(-step.tokens // (32 * step.schedule.segments_per_block))
    readings, states = run_on_fake_tensors(step)
    trace.cache_clear()
    assert blocks > 4 and found.states == states
    computing = max(reading.live for reading in readings.values() if not (reading.taken or reading.elements))
    assert found.computing.live == pytest.approx(computing, rel=0.002)
    reducing = max(reading.live for reading in readings.values() if reading.elements)
    assert max(reading.live for reading in found.reducing if reading.elements) == pytest.approx(reducing, rel=0.01)


def test_offloaded_states_are_not_on_the_device():
    schedule = BlockSchedule(segments_per_block=1)
    step = micro_batch(num_layers=2, tokens=32 * 10, schedule=schedule)
    offloaded = trace(replace(step, schedule=replace(schedule, offload_states=True)))
    assert trace(step).computing.live - offloaded.computing.live == 9 * offloaded.states  # all but those in use
    assert offloaded.states == 4 * 2 * 2 * (32 * 32 + 32)  # fp32, layers, heads, M and z


@pytest.mark.parametrize("fields", [{"rows": 601}, {"rows": 601, "precision": "bf16", "checkpointing": False}])
def test_rows_are_extrapolated_exactly(fields, monkeypatch):
    step = micro_batch(**({"num_layers": 2} | fields))
    found = trace(step)
    monkeypatch.setattr(step_trace, "MANY_TOKENS", 10**9)
    trace.cache_clear()
    assert found == trace(step)
    trace.cache_clear()


def test_a_trace_leaves_random_states_and_defaults_alone():
    random, default = torch.get_rng_state(), torch.get_default_dtype()
    run_on_fake_tensors(micro_batch(num_layers=2, precision="bf16", tokens=77, resid_dropout=0.1))
    assert torch.equal(torch.get_rng_state(), random) and torch.get_default_dtype() == default
    assert type(torch.zeros(1)) is torch.Tensor


def test_flex_attention_needs_no_masks():
    step = micro_batch(num_layers=2, segment_length=64, tokens=640, window_size=64)
    flex = trace(replace(step, attention="flex_attention"))
    assert flex.computing.live < trace(step).computing.live


def test_a_gradient_is_taken_for_each_parameter():
    for checkpointing in (True, False):
        step = micro_batch(num_layers=2, checkpointing=checkpointing)
        taken = [reading.elements for reading in trace(step).reducing if reading.elements]
        assert sorted(taken) == sorted(parameter_sizes(step.config))


def test_live_bytes_follow_allocations():
    with LiveBytes() as live:
        a = torch.zeros(10, 10)
        view = a.view(100)
        assert live.now == live.peak == 400
        b = a + a
        del a
        assert live.now == 800  # the view keeps it
        del view
        assert live.now == 400 and live.peak == 800
        live.start_interval()
        assert live.peak == 400 and live.allocated_in(b) == 0
        c = b.double()
        assert live.peak == 1200 and live.allocated_in(c) == 1


def test_live_bytes_count_what_the_softmax_copies():
    with LiveBytes() as live:
        logits = torch.zeros(10, 10, dtype=torch.bfloat16)
        out = torch.zeros(10, 10)
        torch.softmax(logits, -1, torch.float32, out=out)
        assert live.now == 600 and live.peak == 1000


def test_live_bytes_of_two_gradients_that_meet():
    """Their sum is computed in place, as for real tensors: x, its two gradients, and neither of these twice."""
    with LiveBytes() as live:
        x = torch.zeros(100, requires_grad=True)
        y, z = x.exp(), x.sin()
        loss = (y * z).sum()
        del y, z
        kept = live.now
        live.start_interval()
        loss.backward()
        assert live.peak - kept <= 4 * 400
