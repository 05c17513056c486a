"""The model against the token-by-token reference, GPT-Neo, and itself under every schedule and precision."""

import gc
import json
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TINY, gradients, random_ids, reference_forward, tiny_model
from strategies import batches
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from infini_ds.config.recipe import OptimizerSection
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM, InfiniGPTNeoModel
from infini_ds.model import loss as chunked_loss
from infini_ds.model.presets import PRESETS, preset_config
from infini_ds.training.optimizer_groups import parameter_groups

few = settings(deadline=None, max_examples=25, derandomize=True)
many = settings(deadline=None, max_examples=60, derandomize=True)
exact = {"rtol": 1e-9, "atol": 1e-11}


# ---- the reference


@given(batches())
@many
def test_model_is_the_reference(batch):
    model, ids, mask, documents = batch
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    with torch.no_grad():
        out = model(ids, mask, documents)
        logits, M, z = reference_forward(model, ids, mask, documents)
    assert_close(out.logits[valid], logits[valid], **exact)
    assert_close(torch.stack([state.M for state in out.memory]), M, **exact)
    assert_close(torch.stack([state.z for state in out.memory]), z, **exact)


@given(batches(max_segments=3))
@few
def test_every_gradient_is_the_references(batch):
    """Of the loss, and of the last memory, which later text would send its gradient through."""
    model, ids, mask, documents = batch
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    out = model(ids, mask, documents)
    logits, M, z = reference_forward(model, ids, mask, documents)
    weight = torch.randn_like(logits[valid])
    M_weight, z_weight = torch.randn_like(M), torch.randn_like(z)
    got_M, got_z = (torch.stack(states) for states in zip(*out.memory, strict=True))
    got = (weight * out.logits[valid]).sum() + (M_weight * got_M).sum() + (z_weight * got_z).sum()
    want = (weight * logits[valid]).sum() + (M_weight * M).sum() + (z_weight * z).sum()
    want = want + 0 * model.lm_head.weight.sum()  # a graph, also where no token is valid
    assert_close(gradients(got, model), gradients(want, model), rtol=1e-7, atol=1e-8)


def test_reference_without_memory():
    model, ids = tiny_model(segments_per_block=2), random_ids(2, 11)
    with torch.no_grad():
        want, _, _ = reference_forward(model, ids, use_memory=False)
        assert_close(model(ids, use_memory=False).logits, want, **exact)
        assert (model(ids).logits - want)[:, 4:].abs().max() > 1e-2


def test_base_model_gives_the_hidden_states_of_the_logits():
    model, ids = tiny_model(), random_ids(2, 11)
    with torch.no_grad():
        hidden = model.transformer(ids).last_hidden_state
        assert_close(model.lm_head(hidden), model(ids).logits, **exact)


# ---- schedules


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
def test_truncated_gradients_end_where_a_cache_begins(truncate_blocks, checkpointing):
    """The last block's loss has the gradient that it has after a cache of what came before the cut."""
    S, G, blocks = 4, 2, 4
    model, ids = tiny_model(segment_length=S, segments_per_block=G).train(), random_ids(2, blocks * G * S)
    cut = (blocks - 1) // truncate_blocks * truncate_blocks * G * S
    labels = ids.clone()
    labels[:, : 1 - G * S] = -100  # only what is predicted inside the last block
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


def test_checkpointing_draws_the_same_dropout():
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
    """Bytes that a forward pass in training keeps for its backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # x is held, so that its address stays its own
        return x

    ids = random_ids(2, T)
    with saved_tensors_hooks(pack, lambda x: x):
        loss = model(ids, labels=ids).loss
    assert loss.requires_grad
    return sum(nbytes for nbytes, _ in kept.values())


def test_checkpointing_keeps_ids_and_boundary_states_alone():
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


def test_layers_are_recomputed_where_the_option_says():
    S, G = 8, 4
    model = tiny_model(segment_length=S, segments_per_block=G, window_size=4, intermediate_size=512).train()
    all_kept = saved_bytes(model, 8 * S * G)
    model.block_schedule = BlockSchedule(G, checkpoint_layers=True)
    assert saved_bytes(model, 8 * S * G) < all_kept / 10


def test_checkpointing_holds_what_lives_to_a_few_boundary_states():
    """All that lives between forward and backward, also what is not a saved tensor but a checkpoint's argument."""

    def storages() -> dict[int, int]:
        gc.collect()
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}

    S, G, B = 8, 4, 2
    model = tiny_model(segment_length=S, segments_per_block=G, intermediate_size=512).train()
    model.gradient_checkpointing_enable()
    H, D, L = model.config.num_heads, model.config.head_dim, model.config.num_layers
    costs = []
    for blocks in (4, 12):
        ids = random_ids(B, blocks * S * G)
        before = storages()  # whatever else lives in this process, some of which may go meanwhile
        loss = model(ids, labels=ids).loss
        costs.append(sum(size for place, size in storages().items() if place not in before))
        del loss
    states, tokens = B * L * H * (D * D + D) * 8, B * S * G * 8
    assert (costs[1] - costs[0]) / 8 <= states + 2 * tokens + 64  # ids and targets; 64 for the block's loss


@pytest.mark.timeout(600)
def test_compiled_layers_give_the_same():
    """Compilation for real: with blocks, recomputing and packed documents."""
    fields = {"segment_length": 4, "segments_per_block": 2, "attention_types": [[["global"], 2]]}
    model, compiled = tiny_model(**fields).train(), tiny_model(**fields).train()
    compiled.compile_layers()
    ids = random_ids(2, 16)
    documents = torch.tensor([[0] * 6 + [1] * 10, [0] * 16])
    results = []
    for each in (model, compiled):
        each.gradient_checkpointing_enable()
        loss = each(ids, document_ids=documents, labels=ids).loss
        results.append((loss, gradients(loss, each)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] and not torch._dynamo.utils.counters["graph_break"]
    assert_close(results[1], results[0], **exact)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_flex_attention_gives_what_a_mask_gives(device):
    """Packed documents by rule, tile by tile. On the CPU without gradients, which PyTorch has for GPUs alone."""
    S, results = 136, []
    fields = {"segment_length": S, "window_size": 40, "hidden_size": 32, "max_position_embeddings": S}
    documents = torch.rand(2, 3 * S - 5, generator=torch.Generator().manual_seed(0)).lt(0.02).long().cumsum(1)
    ids = random_ids(*documents.shape)
    for kind in ("sdpa", "flex_attention"):
        model = tiny_model(dtype=torch.float32, attn_implementation=kind, **fields).to(device)
        assert model.config._attn_implementation == kind
        with torch.set_grad_enabled(device == "cuda"):
            loss = model(ids.to(device), document_ids=documents.to(device), labels=ids.to(device)).loss
        results.append((loss, gradients(loss, model) if device == "cuda" else {}))
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_training_on_labels_makes_no_logits():
    model, ids = tiny_model().train(), random_ids(2, 9)
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, return_logits=True).logits.shape == (2, 9, TINY["vocab_size"])
    assert model(ids).logits is not None
    assert model.eval()(ids, labels=ids).logits is not None


# ---- GPT-Neo

GPT_NEO = {name: value for name, value in TINY.items() if name != "segment_length"} | {"initializer_range": 0.3}


def gpt_neo() -> GPTNeoForCausalLM:
    torch.manual_seed(0)
    return GPTNeoForCausalLM(GPTNeoConfig(**GPT_NEO)).eval()


@pytest.mark.parametrize("kinds", [["global"], ["local"], ["global", "local"]])
@pytest.mark.parametrize("T", [1, 2, 15, 16])
def test_one_segment_is_gpt_neo(kinds, T):
    fields = GPT_NEO | {"num_layers": len(kinds), "attention_types": [[kinds, 1]]}
    torch.manual_seed(0)
    theirs = GPTNeoForCausalLM(GPTNeoConfig(**fields)).eval()
    ours = InfiniGPTNeoForCausalLM(InfiniGPTNeoConfig(segment_length=16, gate_init=3.0, **fields)).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert all(name.endswith("beta") for name in missing) and not unexpected
    ids = random_ids(2, T)
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        if T > 1:
            want = theirs(ids, labels=ids).loss
            assert_close(ours(ids, labels=ids).loss, want, rtol=1e-5, atol=1e-5)


def test_an_override_is_checked_as_any_field(tmp_path):
    gpt_neo().save_pretrained(tmp_path)
    for load in (InfiniGPTNeoConfig.from_pretrained, InfiniGPTNeoForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="segment_length=0 must be at least 1"):
            load(tmp_path, segment_length=0)
    config, unused = InfiniGPTNeoConfig.from_pretrained(tmp_path, segment_length=8, other=1, return_unused_kwargs=True)
    assert config.segment_length == 8 and unused == {"other": 1}


def test_gpt_neo_checkpoint_loads(tmp_path):
    """save_pretrained of GPT-Neo, then from_pretrained of ours; with left padding as without."""
    theirs = gpt_neo()
    theirs.save_pretrained(tmp_path)
    ours, info = InfiniGPTNeoForCausalLM.from_pretrained(
        tmp_path, segment_length=16, gate_init=0.25, output_loading_info=True
    )
    assert sorted(info["missing_keys"]) == [f"transformer.h.{i}.attn.attention.beta" for i in range(2)]
    assert not info["unexpected_keys"]
    assert ours.config.segment_length == 16
    for layer in ours.transformer.h:
        assert torch.equal(layer.attention.beta, torch.full((2,), 0.25))
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert not ours.training

    ids, padding = random_ids(2, 12), 4
    with torch.no_grad():
        want = theirs(ids).logits
        assert_close(ours(ids).logits, want, rtol=1e-5, atol=1e-5)
        padded, mask = F.pad(ids, (padding, 0)), F.pad(torch.ones_like(ids), (padding, 0))
        assert_close(ours(padded, mask).logits[:, padding:], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position_embedding", ["segment", "rotary"])
def test_save_and_load_gives_the_same_model(tmp_path, position_embedding):
    model, ids = tiny_model(dtype=torch.float32, position_embedding=position_embedding), random_ids(2, 11)
    model.save_pretrained(tmp_path)
    for cls in (InfiniGPTNeoForCausalLM, AutoModelForCausalLM):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is InfiniGPTNeoForCausalLM
        for name, weight in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], weight), name
        assert torch.equal(again(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is InfiniGPTNeoModel
    assert torch.equal(base(ids).last_hidden_state, model.transformer(ids).last_hidden_state)


def test_weights_start_as_gpt_neos():
    config = InfiniGPTNeoConfig(**(TINY | {"hidden_size": 64, "vocab_size": 500, "gate_init": -1.5}))
    model = InfiniGPTNeoForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("beta"):
            assert torch.equal(weight, torch.full_like(weight, -1.5))
        elif name.endswith("bias"):
            assert not weight.any(), name
        elif "ln_" in name:
            assert (weight == 1).all(), name
        else:
            assert_close(weight.std(), torch.tensor(config.initializer_range), rtol=0.2, atol=0, msg=name)


# ---- who influences whom


def influence(model: InfiniGPTNeoForCausalLM, ids: torch.Tensor, at: int, **inputs) -> torch.Tensor:
    """bool (T,): positions where another token at `at` changes any bit of the logits."""
    other = ids.clone()
    other[:, at] = ids[:, at] % (TINY["vocab_size"] - 1) + 1
    with torch.no_grad():
        return (model(ids, **inputs).logits != model(other, **inputs).logits).any(-1).any(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("segments_per_block", [None, 2])
@pytest.mark.parametrize("documents", [False, True])
def test_no_token_changes_the_past(dtype, segments_per_block, documents):
    model = tiny_model(dtype=dtype, segments_per_block=segments_per_block)
    ids = random_ids(1, 21)
    inputs = {"document_ids": torch.zeros_like(ids)} if documents else {}
    for at in range(21):
        changed = influence(model, ids, at, **inputs)
        assert not changed[:at].any()
        assert changed[at]


@pytest.mark.parametrize("segments_per_block", [None, 1, 3])
def test_no_token_changes_another_document(segments_per_block):
    model = tiny_model(dtype=torch.float32, segments_per_block=segments_per_block)
    documents = torch.tensor([[0] * 6 + [1] * 1 + [2] * 9 + [5] * 8 + [6] * 3])
    ids = random_ids(1, documents.shape[1])
    for at in range(documents.shape[1]):
        changed = influence(model, ids, at, document_ids=documents)
        assert not changed[documents[0] != documents[0, at]].any()
        assert changed[at]


def test_no_row_changes_another():
    model, ids = tiny_model(dtype=torch.float32), random_ids(3, 14)
    other = ids.clone()
    other[1] = other[1].flip(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits[[0, 2]], model(other).logits[[0, 2]])


def test_a_document_gives_the_same_wherever_it_is_packed():
    """On a segment boundary a packed document computes exactly what it computes in a row of its own."""
    model, S = tiny_model(), TINY["segment_length"]
    first, second = random_ids(1, 3 * S, seed=1), random_ids(1, 2 * S + 3, seed=2)
    documents = torch.tensor([[4] * first.shape[1] + [7] * second.shape[1]])
    with torch.no_grad():
        packed = model(torch.cat([first, second], dim=1), document_ids=documents).logits
        assert_close(packed[:, : 3 * S], model(first).logits, **exact)
        assert_close(packed[:, 3 * S :], model(second).logits, **exact)


def test_the_memory_reaches_over_many_segments_and_local_attention_does_not():
    model, ids, S = tiny_model(), random_ids(1, 80), TINY["segment_length"]
    changed = influence(model, ids, 1)
    assert changed[S:].all()
    without = influence(model, ids, 1, use_memory=False)
    assert without[1:S].any() and not without[S:].any()


@pytest.mark.parametrize("segments_per_block", [None, 1, 3])
@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("lengths", [(23, 23), (23, 9), (9, 23)])
def test_a_row_that_reads_anothers_memory_is_its_segments_after_the_others_cache(lengths, rule, segments_per_block):
    """Segment s of one row after the other row's first s segments, one after the other: the obvious way."""
    model = tiny_model(1, segment_length=4, memory_rule=rule, segments_per_block=segments_per_block)
    (T, U), S = lengths, 4
    one, other = random_ids(1, T, 1), random_ids(1, U, 2)
    with torch.no_grad():
        expected = []
        for start in range(0, T, S):
            before = other[:, :start]
            cache = model(before, use_cache=True).past_key_values if start else None
            if cache is not None:  # where the other row has ended inside a segment, that has to be closed
                for state, closed in zip(cache.layer_caches, model(before).memory, strict=True):
                    state.memory = closed
                cache.open_documents.fill_(-1)
                cache.memory_document.fill_(0)
                cache.min_free_slots = S
            expected.append(model(one[:, start : start + S], past_key_values=cache).logits)
        ids = torch.zeros(2, max(lengths), dtype=torch.long)
        ids[0, :T], ids[1, :U] = one, other
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        out = model(ids, mask.long(), memory_of=torch.tensor([1, 1]))
        alone = model(other).logits
    assert_close(out.logits[:1, :T], torch.cat(expected, dim=1), **exact)
    assert_close(out.logits[1:, :U], alone, **exact)
    if T == U:
        assert_close(model(ids, memory_of=torch.tensor([1, 1])).logits, out.logits, **exact)
    assert not torch.allclose(out.logits[0, S:T], model(one).logits[0, S:])


@given(batches())
@few
def test_reading_ones_own_memory_is_the_plain_model(batch):
    model, ids, mask, documents = batch
    with torch.no_grad():
        plain = model(ids, mask, documents)
        own = model(ids, mask, documents, memory_of=torch.arange(len(ids)))
    assert torch.equal(own.logits, plain.logits)


def test_nothing_is_read_where_the_other_row_has_written_nothing():
    model = tiny_model(2, segment_length=4)
    ids = random_ids(2, 12, 3)
    mask = torch.tensor([[1] * 12, [0] * 12])
    with torch.no_grad():
        out = model(ids, mask, memory_of=torch.tensor([1, 1])).logits[0]
        off = model(ids[:1], use_memory=False).logits[0]
    assert_close(out, off, **exact)


def test_a_layers_window_ends_inside_its_segment():
    fields = {"num_layers": 1, "attention_types": [[["local"], 1]], "window_size": 3, "segment_length": 8}
    changed = influence(tiny_model(**fields), random_ids(1, 8), 2)
    assert changed.tolist() == [False, False, True, True, True, False, False, False]


# ---- losses


def next_token_losses(logits, ids, labels, mask=None):
    """(B, T) of each token the loss of the token after it in its row, however much padding stands between."""
    losses = torch.zeros(ids.shape, dtype=logits.dtype)
    for b in range(ids.shape[0]):
        columns = [t for t in range(ids.shape[1]) if mask is None or mask[b, t]]
        for now, after in pairwise(columns):
            losses[b, now] = F.cross_entropy(logits[b, now], labels[b, after])
    return losses.nan_to_num(0.0)


@given(batches(), st.sampled_from([0.0, 0.5]), st.booleans())
@many
def test_losses_are_cross_entropy_on_the_logits(batch, ignored, training):
    model, ids, mask, documents = batch
    model.train(training)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < ignored, -100)
    with torch.no_grad():
        out = {
            name: model(ids, mask, documents, labels=labels, loss_reduction=name, return_logits=True)
            for name in ("none", "sum", "mean")
        }
        losses = next_token_losses(out["none"].logits, ids, labels, mask)
        divided = model(ids, mask, documents, labels=labels, num_items_in_batch=7).loss
    assert out["none"].loss.shape == (ids.shape[0], ids.shape[1] - 1)
    assert_close(out["none"].loss, losses[:, :-1], **exact)
    assert_close(out["sum"].loss, losses.sum(), **exact)
    assert_close(divided, losses.sum() / 7, **exact)
    count = (losses != 0).sum()
    if count:
        assert_close(out["mean"].loss, losses.sum() / count, **exact)


def test_loss_of_gpt_neos_shift():
    model, ids = tiny_model(), random_ids(3, 15)
    out = model(ids, labels=ids)
    assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), **exact)
    count = torch.tensor(4 * 14)
    assert_close(model(ids, labels=ids, num_items_in_batch=count).loss, out.loss * 3 * 14 / count, **exact)


def test_no_label_at_all():
    """Nothing to learn from: a sum of 0 with gradients of 0; a mean of nothing is nan, as in torch."""
    model, ids = tiny_model().train(), random_ids(2, 9)
    for inputs in (
        {"labels": torch.full_like(ids, -100)},
        {"labels": ids, "attention_mask": torch.zeros_like(ids)},
        {"labels": ids[:, :1], "input_ids": ids[:, :1]},
    ):
        loss = model(**({"input_ids": ids} | inputs), loss_reduction="sum").loss
        assert loss == 0
        assert not any(g.any() for g in gradients(loss, model).values())
        assert model(**({"input_ids": ids} | inputs)).loss.isnan()


def test_loss_reduction_names_its_values():
    model, ids = tiny_model(), random_ids(1, 3)
    with pytest.raises(ValueError, match="loss_reduction='max' is not one of mean, sum, none"):
        model(ids, labels=ids, loss_reduction="max")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_over_more_rows_than_a_chunk(checkpointing, monkeypatch):
    """The loss is taken in chunks of rows: one by one, summed, or inside of a checkpoint, it is the same."""
    model = tiny_model(segments_per_block=200).train()
    monkeypatch.setattr(chunked_loss, "MAX_CHUNK_LOGITS", 300 * model.config.vocab_size)
    model.transformer.gradient_checkpointing = checkpointing
    ids = random_ids(2, 1301)
    want = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    want_gradients = gradients(want, model)
    for loss in (
        model(ids, labels=ids, loss_reduction="sum").loss,
        model(ids, labels=ids, loss_reduction="none").loss.sum(),
    ):
        assert_close(loss, want, **exact)
        assert_close(gradients(loss, model), want_gradients, rtol=1e-7, atol=1e-7)


def test_logits_to_keep():
    model, ids = tiny_model(), random_ids(2, 11)
    with torch.no_grad():
        assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:], **exact)


# ---- precision


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
@pytest.mark.parametrize("position_embedding", ["segment", "rotary"])
def test_memory_stays_fp32_in_bf16(mode, position_embedding):
    fields = {"segments_per_block": 2, "position_embedding": position_embedding}
    model = tiny_model(dtype=torch.bfloat16 if mode == "bf16" else torch.float32, **fields).train()
    exact_model = tiny_model(**fields)
    exact_model.load_state_dict(model.state_dict())
    ids = random_ids(2, 23)
    mask = torch.ones_like(ids)
    mask[0, 3:9] = 0
    mask[1] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        for inputs in ({}, {"attention_mask": mask}):
            out = model(ids, labels=ids, return_logits=True, **inputs)
            assert out.logits.dtype == torch.bfloat16
            assert {x.dtype for state in out.memory for x in state} == {torch.float32}
            want = exact_model(ids, labels=ids, **inputs)
            assert_close(out.loss.double(), want.loss, rtol=0.05, atol=0)
            for name, gradient in gradients(out.loss, model).items():
                assert gradient.isfinite().all(), name


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_no_nan_where_there_is_nothing_to_see(mode):
    """Empty memories, rows of padding alone, segments of padding alone, one token."""
    model = tiny_model(dtype=torch.bfloat16 if mode == "bf16" else torch.float32, segments_per_block=1).train()
    ids = random_ids(3, 14)
    mask = torch.ones_like(ids)
    mask[0], mask[1, :9], mask[2, 5:] = 0, 0, 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        for inputs in (
            {"attention_mask": mask},
            {"attention_mask": mask, "document_ids": torch.arange(14).expand(3, -1)},
        ):
            out = model(ids, labels=ids, loss_reduction="sum", return_logits=True, **inputs)
            assert out.logits.isfinite().all() and out.loss.isfinite()
            assert all(g.isfinite().all() for g in gradients(out.loss, model).values())
        assert model(ids[:, :1]).logits.isfinite().all()


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_long_text_stays_finite_and_z_exact(mode):
    model = tiny_model(dtype=torch.bfloat16 if mode == "bf16" else torch.float32, segments_per_block=128).train()
    ids = random_ids(1, 640 * TINY["segment_length"])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        out = model(ids, labels=ids)
    assert out.loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(out.loss, model).values())
    if mode == "fp32":
        exact_model = tiny_model()
        exact_model.load_state_dict(model.state_dict())
        with torch.no_grad():
            want = exact_model(ids).memory
        for got_state, want_state in zip(out.memory, want, strict=True):
            assert_close(got_state.z.double(), want_state.z, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [10, 30, 100, 1000])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_large_activations_keep_finite_gradients(mode, scale):
    """phi of whole heads underflows here; a plain ELU(x) + 1 gave gradients of 1e30 at 30 and nan at 100."""
    torch.manual_seed(0)
    config = InfiniGPTNeoConfig(**(TINY | {"initializer_range": 0.3}))
    model = InfiniGPTNeoForCausalLM(config).train()
    with torch.no_grad():
        for layer in model.transformer.h:
            for projection in (layer.attention.q_proj, layer.attention.k_proj):
                projection.weight *= scale
    model = model.to(torch.bfloat16 if mode == "bf16" else torch.float32)
    ids = random_ids(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        loss = model(ids, labels=ids).loss
    largest = max(g.abs().max() for g in gradients(loss, model).values())
    assert largest < 10  # a few hundredths to a few units in fp64


# ---- gates


def test_gates_learn_from_the_start():
    model, ids = tiny_model().train(), random_ids(2, 12)
    for layer in model.transformer.h:
        layer.attention.beta.data.zero_()
    beta = {name: g for name, g in gradients(model(ids, labels=ids).loss, model).items() if name.endswith("beta")}
    assert len(beta) == 2 and all((g != 0).all() for g in beta.values())
    one_segment = gradients(model(ids[:, :4], labels=ids[:, :4]).loss, model)
    assert not any(one_segment[name].any() for name in beta)


def test_raising_beta_raises_the_memorys_share():
    """From local attention alone at -40 to the memory alone at +40, the influence of the first segment grows."""
    model, ids = tiny_model(num_layers=1, attention_types=[[["global"], 1]]), random_ids(1, 8)
    other = ids.clone()
    other[:, :4] = ids[:, :4].flip(1) % (TINY["vocab_size"] - 1) + 1
    attention, effects = model.transformer.h[0].attention, []
    caught = []
    attention.out_proj.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    for beta in (-40.0, -1.0, 0.0, 1.0, 40.0):
        attention.beta.data.fill_(beta)
        caught.clear()
        with torch.no_grad():
            model(ids), model(other)
        effects.append((caught[0] - caught[1])[:, 4:].norm().item())
    assert effects[0] < 1e-12 and effects == sorted(effects) and effects[-1] > 0
    for beta, effect in zip((-1.0, 0.0, 1.0), effects[1:4], strict=True):
        assert math.isclose(effect, effects[-1] / (1 + math.exp(-beta)), rel_tol=1e-9)


def test_gates_reach_four_within_a_normal_run():
    """600 steps at the default learning rate of the gates, towards a model whose gates stand at +6 and -6.

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


# ---- configuration


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


def test_a_rotary_segment_may_be_longer_than_the_learned_positions():
    model = tiny_model(position_embedding="rotary", segment_length=40)
    assert model(random_ids(1, 81)).logits.shape[1] == 81
    assert not any("wpe" in name for name in model.state_dict())


def test_configuration_survives_a_round_trip(tmp_path):
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
def test_presets_are_possible(name):
    config = preset_config(name, segment_length=64)
    assert config.segment_length == 64
    assert len(config.attention_layers) == config.num_layers
    with torch.device("meta"):
        assert sum(p.numel() for p in InfiniGPTNeoForCausalLM(config).parameters()) > 1e6


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset='huge' is not one of tiny"):
        preset_config("huge")


def test_misspelt_argument_is_refused():
    model, ids = tiny_model(), random_ids(1, 9)
    with pytest.raises(TypeError, match="lables"):
        model(ids, lables=ids)
    model(ids, return_dict=True, output_attentions=False, cache_position=None)
