"""The gates: their gradient, their direction, and how far they move in a run."""

import math

import torch
import torch.nn.functional as F
from reference import TINY, gradients, random_ids, tiny_model

from infini_ds.config.recipe import OptimizerSection
from infini_ds.training.engine import parameter_groups


def test_every_gate_has_a_gradient_at_the_start():
    model, ids = tiny_model().train(), random_ids(2, 12)
    for layer in model.transformer.h:
        layer.attention.beta.data.zero_()
    beta = {name: g for name, g in gradients(model(ids, labels=ids).loss, model).items() if name.endswith("beta")}
    assert len(beta) == 2 and all((g != 0).all() for g in beta.values())
    one_segment = gradients(model(ids[:, :4], labels=ids[:, :4]).loss, model)
    assert not any(one_segment[name].any() for name in beta)


def test_a_larger_beta_gives_the_memory_more_weight():
    """From local attention only at -40 to the memory only at +40, the influence of the first segment grows."""
    model, ids = tiny_model(num_layers=1, attention_types=[[["global"], 1]]), random_ids(1, 8)
    other = ids.clone()
    other[:, :4] = ids[:, :4].flip(1) % (TINY["vocab_size"] - 1) + 1
    attention, effects = model.transformer.h[0].attention, []
    captured = []
    attention.out_proj.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    for beta in (-40.0, -1.0, 0.0, 1.0, 40.0):
        attention.beta.data.fill_(beta)
        captured.clear()
        with torch.no_grad():
            model(ids), model(other)
        effects.append((captured[0] - captured[1])[:, 4:].norm().item())
    assert effects[0] < 1e-12 and effects == sorted(effects) and effects[-1] > 0
    for beta, effect in zip((-1.0, 0.0, 1.0), effects[1:4], strict=True):
        assert math.isclose(effect, effects[-1] / (1 + math.exp(-beta)), rel_tol=1e-9)


def test_gates_reach_four_within_a_normal_run():
    """In 600 steps at the default learning rate of the gates, towards a model whose gates are +6 and -6.

    At +4 a head takes 98% of its output from the memory, at -4 2%.
    """
    goal, model = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32)
    for layer, wanted in zip(model.transformer.h, goal.transformer.h, strict=True):
        layer.attention.beta.data.zero_()
        wanted.attention.beta.data.copy_(torch.tensor([6.0, -6.0]))
    groups = [g for g in parameter_groups(model, OptimizerSection()) if g["name"] == "gates"]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    ids = random_ids(4, 24)
    with torch.no_grad():
        want = goal(ids).logits.log_softmax(-1)
    for _ in range(600):
        optimizer.zero_grad()
        F.kl_div(model(ids).logits.log_softmax(-1), want, log_target=True, reduction="batchmean").backward()
        optimizer.step()
    for layer in model.transformer.h:
        assert layer.attention.beta[0] > 4 and layer.attention.beta[1] < -4
