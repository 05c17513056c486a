"""FLOPs per token, counted by hand and by the usual rule of six for each parameter."""

import gated_decay  # noqa: F401  registers its memory rule
import pytest

from infini_ds.model.memory_rule import get_memory_rule
from infini_ds.model.presets import preset_config
from infini_ds.planning.flops import training_flops_per_token
from infini_ds.planning.memory_estimate import parameters


def test_operations_of_a_small_model_counted_by_hand():
    config = preset_config("tiny", hidden_size=8, num_layers=2, num_heads=2, vocab_size=10, segment_length=16)
    matrices = 2 * (4 * 8 * 8 + 2 * 8 * 32) + 8 * 10
    attention = 2 * 8 * 16  # two layers; scores and values, over half a segment
    memory = 2 * (2 * 2 * 4 * 4)  # two layers; written and read, two heads of 4 x 4
    assert training_flops_per_token(config) == 6 * (matrices + attention + memory)


def test_a_short_convolution_is_counted():
    plain, convolved = (
        training_flops_per_token(preset_config("tiny", hidden_size=8, num_layers=2, num_heads=2, short_conv=width))
        for width in (0, 3)
    )
    assert convolved - plain == 6 * (2 * 2 * 3 * 8)  # two layers, keys and values, three taps, eight channels


def test_a_convolution_of_embeddings_is_counted_once():
    plain, convolved = (
        training_flops_per_token(preset_config("tiny", hidden_size=8, num_layers=2, num_heads=2, embed_conv=width))
        for width in (0, 3)
    )
    assert convolved - plain == 6 * 3 * 8  # three taps, eight channels


def test_a_window_is_counted_instead_of_the_segment():
    wide, narrow = (
        training_flops_per_token(preset_config("tiny", segment_length=512, window_size=window)) for window in (256, 128)
    )
    assert wide - narrow == 6 * 2 * (2 * 128 * 128)  # two of four layers are local


def test_about_six_for_each_parameter_of_a_large_model():
    config = preset_config("1.3b", segment_length=128)
    assert training_flops_per_token(config) == pytest.approx(6 * parameters(config), rel=0.03)


def test_the_memory_rule_is_asked():
    linear, decayed = (preset_config("tiny", memory_rule=rule) for rule in ("linear", "gated_decay"))
    more = get_memory_rule("gated_decay").flops_per_token(decayed) - get_memory_rule("linear").flops_per_token(linear)
    assert more > 0
    difference = training_flops_per_token(decayed) - training_flops_per_token(linear)
    assert difference == pytest.approx(6 * linear.num_layers * more)
