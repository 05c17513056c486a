"""Recomputed blocks draw the same random numbers, wherever these are drawn."""

import copy

import pytest
import torch
from adapter import Adapter
from reference import random_ids, tiny_model
from torch import nn
from torch.testing import assert_close

S, G = 4, 2


def add_adapters(model):
    for layer in model.transformer.h:
        attention = layer.attention
        attention.q_proj, attention.v_proj = Adapter(attention.q_proj, 0.5), Adapter(attention.v_proj, 0.5)


def set_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5


def add_noise(model):
    """Noise on the embeddings, as in NEFTune."""
    model.transformer.wte.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))


def add_noise_in_a_layer(model):
    model.transformer.h[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] + torch.randn_like(args[0]),))


def configured(model):
    model.config.attention_dropout = 0.5


def gradients(model, ids):
    torch.manual_seed(1)
    loss = model(ids, labels=ids).loss
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state), "the backward pass has moved the random state"
    return loss.detach(), {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("change", [add_adapters, set_dropout, add_noise, add_noise_in_a_layer, configured])
@pytest.mark.parametrize("checkpoint_layers", [False, True])
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_gradients_are_those_without_recomputation(change, checkpoint_layers, checkpoint_blocks):
    plain = tiny_model(segment_length=S, segments_per_block=G).train()
    ids = random_ids(2, 3 * S * G + 3)
    exact = gradients(copy.deepcopy(plain), ids)
    change(plain)
    recomputing = copy.deepcopy(plain)
    recomputing.block_schedule = type(plain.block_schedule)(segments_per_block=G, checkpoint_layers=checkpoint_layers)
    if checkpoint_blocks:
        recomputing.gradient_checkpointing_enable()
    want = gradients(plain, ids)
    assert not torch.isclose(want[0], exact[0], rtol=1e-4)  # random numbers were drawn
    assert_close(gradients(recomputing, ids), want, rtol=1e-9, atol=1e-11)


def test_nothing_is_restored_where_nothing_is_drawn(monkeypatch):
    """It costs nothing for a model without randomness; with it, only the blocks that draw are restored."""
    restored = []
    fork = torch.random.fork_rng
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda *args, **options: (restored.append(1), fork(*args, **options))[1]
    )
    model, ids = tiny_model(segment_length=S, segments_per_block=G).train(), random_ids(2, 3 * S * G)
    model.gradient_checkpointing_enable()
    gradients(model, ids)
    assert restored == []
    add_adapters(model)
    gradients(model, ids)
    assert len(restored) == 3
