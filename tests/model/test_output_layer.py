"""The loss is that of the logits, whatever module computes them; a sequence's logits never exist in training."""

import gated_decay  # noqa: F401, registers the rule
import pytest
import torch
import torch.nn.functional as F
from adapter import Adapter
from reference import random_ids, tiny_model
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from infini_ds.model import loss as chunked_loss

exact = {"rtol": 1e-9, "atol": 1e-11}


class Scaled(nn.Module):
    def forward(self, weight):
        return 3 * weight


def with_adapter(model):
    model.lm_head = Adapter(model.lm_head, 0.0)


def with_bias(model):
    model.lm_head.bias = nn.Parameter(torch.randn(model.config.vocab_size, dtype=torch.float64))


def with_hook(model):
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)


def with_pre_hook(model):
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 2,))


def with_parametrization(model):
    parametrize.register_parametrization(model.lm_head, "weight", Scaled())


def with_its_own_forward(model):
    model.lm_head.forward = lambda x: F.linear(x, model.lm_head.weight).tanh()


def as_a_subclass(model):
    class Capped(nn.Linear):
        def forward(self, x):
            return 5 * torch.tanh(super().forward(x) / 5)

    model.lm_head.__class__ = Capped


CHANGES = [
    with_adapter,
    with_bias,
    with_hook,
    with_pre_hook,
    with_parametrization,
    with_its_own_forward,
    as_a_subclass,
]


def gradients(model):
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_loss_and_gradients_are_those_of_the_logits(change, checkpointing, monkeypatch):
    monkeypatch.setattr(chunked_loss, "MAX_CHUNK_ROWS", 5)
    ids = random_ids(2, 21)
    plain_loss = tiny_model(tie_word_embeddings=False)(ids, labels=ids).loss
    models = [tiny_model(tie_word_embeddings=False, segments_per_block=2) for _ in range(2)]
    for model in models:
        torch.manual_seed(2)
        change(model)
    want_model, model = models
    want = F.cross_entropy(want_model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    want.backward()
    assert not torch.isclose(want, plain_loss, rtol=1e-4)  # the change has an effect
    with torch.no_grad():
        losses = model(ids, labels=ids, loss_reduction="none").loss
        assert_close(losses.mean(), want.detach(), **exact)
        assert_close(model(ids, labels=ids).loss, want.detach(), **exact)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    loss = model(ids, labels=ids, return_logits=False).loss
    loss.backward()
    assert_close(loss, want, **exact)
    assert_close(gradients(model), gradients(want_model), **exact)


def test_logits_of_a_complete_sequence_do_not_exist_with_a_changed_layer(monkeypatch):
    monkeypatch.setattr(chunked_loss, "MAX_CHUNK_ROWS", 5)
    rows = []
    model, ids = tiny_model().train(), random_ids(2, 21)
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    model(ids, labels=ids).loss.backward()
    assert max(rows) <= 5


def test_a_plain_layer_is_not_called(monkeypatch):
    """Its loss and gradients are fused."""
    model, ids = tiny_model().train(), random_ids(2, 21)
    monkeypatch.setattr(nn.Linear, "forward", _refused_for(model.lm_head, nn.Linear.forward))
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


def _refused_for(layer, forward):
    def run(self, x):
        assert self is not layer
        return forward(self, x)

    return run


def test_dynamic_int8_with_labels():
    model, ids = tiny_model(dtype=torch.float32, tie_word_embeddings=False), random_ids(2, 21)
    exact_loss = model(ids, labels=ids).loss
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantized.lm_head) is not nn.Linear
    out = quantized(ids, labels=ids)
    assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert_close(out.loss, exact_loss, rtol=0.2, atol=0.1)


class LoadingHook:
    """Weights that are on the meta device but while their module runs, as accelerate's `cpu_offload` has them."""

    def __init__(self, module):
        self.module = module
        self.weights = {name: x.detach().clone() for name, x in module.named_parameters(recurse=False)}
        self.forward, module.forward, module._hf_hook = module.forward, self, self
        self.unload()

    def unload(self):
        for name, x in self.weights.items():
            self.module._parameters[name] = nn.Parameter(x.to("meta"), requires_grad=False)

    def __call__(self, *args, **options):
        for name, x in self.weights.items():
            self.module._parameters[name] = nn.Parameter(x, requires_grad=False)
        result = self.forward(*args, **options)
        self.unload()
        return result


@pytest.mark.parametrize("rule", ["linear", "gated_decay"])  # the second has parameters of its own
def test_offloaded_weights(rule):
    model, ids = tiny_model(memory_rule=rule, tie_word_embeddings=False), random_ids(2, 21)
    with torch.no_grad():
        want = model(ids, labels=ids)
        hooks = [LoadingHook(m) for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
        out = model(ids, labels=ids)
    assert len(hooks) > 10 and {x.device.type for x in model.parameters()} == {"meta"}
    assert_close((out.loss, out.logits), (want.loss, want.logits), **exact)
