"""Gradient checkpointing of all blocks: what it must not change, and what it keeps."""

import gc
import subprocess
import sys

import pytest
import torch
from harness import ROOT
from reference import gradients, random_ids, tiny_model
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from infini_ds.model import BlockSchedule, InfiniGPTNeoForCausalLM

exact = {"rtol": 1e-9, "atol": 1e-11}
S, G = 4, 2


def pair(**fields):
    """Return the same model without and with checkpointing, and ids of three blocks and a half."""
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


def test_blocks_are_recomputed_under_the_same_autocast():
    """Although the backward pass runs outside of the context."""
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
    allocated = []
    for offload in (False, True):
        _, model, ids = pair(offload_states=offload)
        model, ids = model.cuda(), ids.cuda()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = model(ids, labels=ids).loss
        allocated.append(torch.cuda.memory_allocated() - before)
        loss.backward()
    assert allocated[1] < allocated[0]


def test_recomputation_repeats_the_dropout():
    ids, results = random_ids(2, 13), []
    for checkpointing in (False, True):
        model = tiny_model(segments_per_block=2, attention_dropout=0.2, embed_dropout=0.2, resid_dropout=0.2).train()
        model.transformer.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        loss = model(ids, labels=ids).loss
        results.append((loss, gradients(loss, model)))
    assert_close(results[0], results[1], **exact)
    assert (results[0][0] - model.eval()(ids, labels=ids).loss).abs() > 1e-4  # there was dropout


def saved_bytes(model: InfiniGPTNeoForCausalLM, T: int) -> int:
    """Return the bytes that a forward pass in training saves for its backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), x)  # keeping x alive keeps its address its own
        return x

    ids = random_ids(2, T)
    with saved_tensors_hooks(pack, lambda x: x):
        loss = model(ids, labels=ids).loss
    assert loss.requires_grad
    return sum(nbytes for nbytes, _ in saved.values())


def test_checkpointing_saves_only_ids_and_boundary_states():
    """One more block of tokens costs its ids and targets, and M and z of each layer, whatever the width of the MLP."""
    S, G, B = 8, 4, 2
    fields = {"segment_length": S, "segments_per_block": G, "window_size": 4, "intermediate_size": 512}
    model = tiny_model(**fields).train()
    model.gradient_checkpointing_enable()
    H, D, L = model.config.num_heads, model.config.head_dim, model.config.num_layers
    block = S * G
    growth = (saved_bytes(model, 9 * block) - saved_bytes(model, 5 * block)) / 4
    states = B * L * H * (D * D + D) * 8
    tokens = B * block * 8
    assert states <= growth <= states + 2 * tokens
    model.gradient_checkpointing_disable()
    activations = (saved_bytes(model, 9 * block) - saved_bytes(model, 5 * block)) / 4
    assert activations > B * L * block * 512 * 8
    assert activations > 50 * growth


def test_checkpoint_layers_saves_layer_inputs_only():
    S, G = 8, 4
    model = tiny_model(segment_length=S, segments_per_block=G, window_size=4, intermediate_size=512).train()
    without = saved_bytes(model, 8 * S * G)
    model.block_schedule = BlockSchedule(G, checkpoint_layers=True)
    assert saved_bytes(model, 8 * S * G) < without / 10


def test_live_tensors_grow_by_ids_and_boundary_states():
    """All tensors that are alive between forward and backward, not only autograd's saved tensors."""

    def storages() -> dict[int, int]:
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}

    S, G, B = 8, 4, 2
    model = tiny_model(segment_length=S, segments_per_block=G, intermediate_size=512).train()
    model.gradient_checkpointing_enable()
    H, D, L = model.config.num_heads, model.config.head_dim, model.config.num_layers
    costs = []
    for blocks in (4, 12):
        ids = random_ids(B, blocks * S * G)
        before = storages()  # of this process's other tensors, some of which may be freed meanwhile
        loss = model(ids, labels=ids).loss
        costs.append(sum(size for address, size in storages().items() if address not in before))
        del loss
    states, tokens = B * L * H * (D * D + D) * 8, B * S * G * 8
    assert (costs[1] - costs[0]) / 8 <= states + 2 * tokens + 64  # ids and targets; 64 for the block's loss


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
    """Resident memory of the process, not what the allocator reports: only it would show a fragmented heap."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], cwd=ROOT, capture_output=True, text=True, check=True)
    _, short, long = (1024 * int(line) for line in done.stdout.split())
    L, H, D = 2, 2, 64
    needed = L * H * (D * D + D) * 4 / 32 + 2 * 8  # ids and targets
    assert (long - short) / (7168 - 1024) <= 1.3 * needed
