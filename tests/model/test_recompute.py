"""Checkpointing over the chain of blocks: what it must not change, and what it costs."""

import subprocess
import sys

import pytest
import torch
from harness import ROOT
from reference import tiny_model
from torch.testing import assert_close

S, G = 4, 2


def pair(**fields):
    """The same model without and with checkpointing, and ids of three blocks and a half."""
    models = [tiny_model(segment_length=S, segments_per_block=G, **fields).train() for _ in range(2)]
    models[1].gradient_checkpointing_enable()
    return *models, torch.randint(models[0].config.vocab_size, (2, 3 * S * G + S))


def named_gradients(model) -> dict[str, torch.Tensor | None]:
    return {name: weight.grad for name, weight in model.named_parameters()}


def test_a_hook_on_a_weight_sees_the_sum_over_all_blocks():
    seen = []
    for model in pair()[:2]:
        model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
        ids = torch.arange(3 * S * G)[None] % model.config.vocab_size
        model(ids, labels=ids).loss.backward()
    assert len(seen) == 2
    assert_close(seen[1], seen[0])


def test_frozen_weights_stay_without_gradient():
    plain, recomputing, ids = pair()
    for model in (plain, recomputing):
        model.transformer.wte.requires_grad_(False)
        model.transformer.h[1].requires_grad_(False)
        model(ids, labels=ids).loss.backward()
    assert recomputing.transformer.wte.weight.grad is None
    assert_close(named_gradients(recomputing), named_gradients(plain))


def test_gradients_add_up_over_steps_and_leave_the_weights_alone():
    plain, recomputing, ids = pair()
    before = {name: weight.clone() for name, weight in recomputing.named_parameters()}
    for model in (plain, recomputing):
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
    assert_close(named_gradients(recomputing), named_gradients(plain))
    assert_close(dict(recomputing.named_parameters()), before, rtol=0, atol=0)


def test_blocks_are_computed_again_under_the_same_autocast():
    """The backward pass is outside of the context."""
    plain, recomputing, ids = (x.float() if isinstance(x, torch.nn.Module) else x for x in pair())
    for model in (plain, recomputing):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
    assert_close(named_gradients(recomputing), named_gradients(plain), rtol=0.02, atol=1e-4)
    exact = pair()[0].float()
    exact(ids, labels=ids).loss.backward()
    weight, rounded = (model.transformer.h[0].mlp.c_fc.weight.grad for model in (exact, recomputing))
    assert (weight - rounded).abs().max() > 1e-3 * weight.abs().max()  # it was autocast


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_offloaded_states_take_nothing_on_the_device():
    held = []
    for offload in (False, True):
        _, model, ids = pair(offload_states=offload)
        model, ids = model.cuda(), ids.cuda()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = model(ids, labels=ids).loss
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
    assert held[1] < held[0]


RESIDENT = """
import torch
from infini_ds.model import BlockSchedule, InfiniGPTNeoForCausalLM
from infini_ds.model.presets import preset_config

torch.set_num_threads(1)
fields = {"num_layers": 2, "num_heads": 2, "vocab_size": 512, "segment_length": 32}
model = InfiniGPTNeoForCausalLM(preset_config("tiny", **fields)).train()
model.block_schedule = BlockSchedule(segments_per_block=1)
model.gradient_checkpointing_enable()
for tokens in (1024, 1024, 7168):
    ids = torch.randint(512, (1, tokens))
    model(ids, labels=ids).loss.backward()
    status = open("/proc/self/status").read()
    print(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_grows_by_states_and_ids():
    """Not what the allocator hands out, but what the process takes: a heap in pieces would show here alone."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], cwd=ROOT, capture_output=True, text=True, check=True)
    _, short, long = (1024 * int(line) for line in done.stdout.split())
    L, H, D = 2, 2, 64
    needed = L * H * (D * D + D) * 4 / 32 + 2 * 8  # ids and targets
    assert (long - short) / (7168 - 1024) <= 1.3 * needed
