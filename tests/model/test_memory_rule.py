"""Memory rules that are not part of the project, added as a user adds them: in a file of their own."""

import json

import pytest
import torch
from gated_decay import GatedDecay
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import REFERENCE_RULES, TINY, gradients, random_ids, reference_forward, tiny_model
from strategies import batches, logits_in_pieces, texts_in_pieces
from torch.testing import assert_close

from infini_ds.config.recipe import OptimizerSection
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM, register_memory_rule
from infini_ds.model.memory import MemoryState, feature_map, prefix_sums, retrieve
from infini_ds.model.memory_rule import RULES, MemoryRule, state_tensors
from infini_ds.planning.flops import training_flops_per_token
from infini_ds.training.engine import parameter_groups

many = settings(deadline=None, max_examples=40, derandomize=True)
exact = {"rtol": 1e-9, "atol": 1e-11}
DECAY = ("gated_decay",)
A = "transformer.h.{}.attn.attention.memory_parameters.a"


def write_decayed(M, z, written, parameters, h):
    """Gated decay of one head by one segment, token by token."""
    decay = 1 / (1 + torch.exp(-parameters["a"][h]))
    return REFERENCE_RULES["linear"](decay * M, decay * z, written, {}, h)


REFERENCE_RULES["gated_decay"] = write_decayed


@given(batches(max_segments=3, rules=DECAY), st.booleans(), st.booleans())
@many
def test_a_new_rule_equals_its_reference_under_every_schedule(batch, checkpointing, offload):
    """Logits, states and all gradients, that of the rule's parameter among them, whatever the blocks and documents."""
    model, ids, mask, documents = batch
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    logits, M, z = reference_forward(model, ids, mask, documents)
    weight = torch.randn_like(logits[valid])
    wanted = (weight * logits[valid]).sum() + M.square().sum() + z.sum() + 0 * model.lm_head.weight.sum()
    model.train().block_schedule = BlockSchedule(model.block_schedule.segments_per_block, offload_states=offload)
    model.transformer.gradient_checkpointing = checkpointing
    out = model(ids, mask, documents)
    got_M, got_z = (torch.stack(states) for states in zip(*out.memory, strict=True))
    total = (weight * out.logits[valid]).sum() + got_M.square().sum() + got_z.sum()
    assert_close((out.logits[valid], got_M, got_z), (logits[valid], M, z), **exact)
    assert_close(gradients(total, model), gradients(wanted, model), rtol=1e-7, atol=1e-8)


def test_a_new_rules_parameter_learns_and_changes_the_output():
    model, ids = tiny_model(memory_rule="gated_decay").train(), random_ids(2, 17)
    found = gradients(model(ids, labels=ids).loss, model)
    assert all((found[A.format(layer)] != 0).all() for layer in range(2))
    linear = tiny_model(memory_rule="linear")
    linear.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        difference = (linear(ids).logits - model.eval()(ids).logits).abs()
    # Up to the second segment only one segment has been written, whose share in M and z is the same.
    assert difference[:, :8].max() < 1e-12 < 1e-4 < difference[:, 8:].max()


def test_documents_stay_apart_under_a_new_rule():
    """To the last bit, in fp32: the tokens of one document change no logit of another."""
    model, ids = tiny_model(dtype=torch.float32, memory_rule="gated_decay"), random_ids(1, 22)
    documents = torch.tensor([[0] * 6 + [1] * 1 + [2] * 15])
    other = torch.where(documents == 2, ids, ids % 18 + 1)
    with torch.no_grad():
        logits, changed = (model(x, document_ids=documents).logits for x in (ids, other))
        assert torch.equal(logits[:, 7:], changed[:, 7:])
        assert not torch.equal(logits[:, :7], changed[:, :7])


@given(texts_in_pieces(rules=DECAY))
@many
def test_a_new_rule_continues_from_a_cache(text):
    """A text in pieces equals the text at once: a segment that stays open does not decay the memory."""
    model, ids, mask, documents, _ = text
    with torch.no_grad():
        complete = model(ids, mask, documents).logits
        logits, _ = logits_in_pieces(*text)
    valid = mask.bool()
    assert_close(logits[valid], complete[valid], **exact)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generation_under_a_new_rule_is_the_same_with_a_cache(options):
    model = tiny_model(seed=26, tie_word_embeddings=False, memory_rule="gated_decay")
    ids = random_ids(2, 6)
    fixed = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [model.generate(ids, max_new_tokens=13, use_cache=use, **fixed, **options) for use in (True, False)]
    assert torch.equal(*texts) and len(texts[0].unique()) > 2


def test_a_new_rule_is_saved_and_loaded(tmp_path):
    model, ids = tiny_model(dtype=torch.float32, memory_rule="gated_decay"), random_ids(2, 15)
    assert A.format(1) in model.state_dict()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["memory_rule"] == "gated_decay"
    loaded = InfiniGPTNeoForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_weights_without_a_rules_parameter_get_its_initial_value(tmp_path):
    linear = tiny_model(dtype=torch.float32)
    linear.save_pretrained(tmp_path)
    model, info = InfiniGPTNeoForCausalLM.from_pretrained(tmp_path, memory_rule="gated_decay", output_loading_info=True)
    assert sorted(info["missing_keys"]) == [A.format(0), A.format(1)]
    for layer, source in zip(model.transformer.h, linear.transformer.h, strict=True):
        assert torch.equal(layer.attention.memory_parameters["a"], torch.full((2,), 2.0))
        assert torch.equal(layer.attention.beta, source.attention.beta)
    made = InfiniGPTNeoForCausalLM(InfiniGPTNeoConfig(**TINY, memory_rule="gated_decay"))
    assert all((layer.attention.memory_parameters["a"] == 2).all() for layer in made.transformer.h)


def test_a_rule_chooses_its_optimizer_group():
    model = tiny_model(memory_rule="gated_decay")
    groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(model, OptimizerSection())}
    own = {id(layer.attention.memory_parameters["a"]) for layer in model.transformer.h}
    assert own < groups["gates"] and len(groups["gates"]) == 4


def test_a_rule_counts_its_operations():
    plain, decayed = (InfiniGPTNeoConfig(**TINY, memory_rule=rule) for rule in ("linear", "gated_decay"))
    more = training_flops_per_token(decayed) - training_flops_per_token(plain)
    assert more == 6 * 2 * 2 * 4 * 5 / 4  # of 2 layers and 2 heads, D = 4: M and z once in a segment of 4 tokens


class Counted(MemoryRule[tuple]):
    """A state of three tensors that is no MemoryState: an empty memory counts 1, and each segment one more."""

    name = "counted"

    def empty_state(self, B, H, D, dtype, device):
        like = {"dtype": dtype, "device": device}
        return torch.ones(B, **like), torch.zeros(B, H, D, **like), torch.zeros(B, H, D, D, **like)

    def write(self, state, k, v, write_mask, memory_document, parameters):
        sums = MemoryState(M=state[2], z=state[1])
        before, after = RULES["linear"].write(sums, k, v, write_mask, memory_document, {})
        written = torch.ones(k.shape[:2], dtype=state[0].dtype)
        if write_mask is not None:
            written = written * write_mask.any(-1)
        # The sum of an emptied memory starts from 0, the count from 1.
        count, count_after = prefix_sums(state[0][:, None] - 1, written[..., None], memory_document)
        return (count[..., 0] + 1, before.z, before.M), (count_after[:, 0] + 1, after.z, after.M)

    def read(self, q, before, parameters):
        count, z, M = before
        return retrieve(feature_map(q), MemoryState(M, z)) / count[:, :, None, None, None]

    def flops_per_token(self, config):
        return RULES["linear"].flops_per_token(config)


register_memory_rule(Counted())


@given(batches(rules=("counted",)), st.sampled_from([None, 1, 2]), st.booleans(), st.booleans())
@many
def test_a_state_of_any_shape_passes_through_every_schedule(batch, segments_per_block, checkpointing, offload):
    model, ids, mask, documents = batch
    model.train().block_schedule = BlockSchedule()
    expected = model(ids, mask, documents, labels=ids, loss_reduction="sum")
    model.block_schedule = BlockSchedule(segments_per_block, offload_states=offload)
    model.transformer.gradient_checkpointing = checkpointing
    out = model(ids, mask, documents, labels=ids, loss_reduction="sum")
    assert_close((out.loss, out.memory), (expected.loss, expected.memory), **exact)
    assert_close(gradients(out.loss, model), gradients(expected.loss, model), rtol=1e-8, atol=1e-10)
    assert list(state_tensors(out.memory[0])) == ["0", "1", "2"]


@given(texts_in_pieces(rules=("counted",)))
@many
def test_a_state_of_any_shape_passes_through_a_cache(text):
    model, ids, mask, documents, pieces = text
    with torch.no_grad():
        complete = model(ids, mask, documents, use_cache=True)
        cache = complete.past_key_values
        cache.reset()
        for piece in pieces:
            some = None if documents is None else documents[:, piece]
            out = model(ids[:, piece], mask[:, piece], some, past_key_values=cache)
            order = torch.arange(len(ids)).flip(0)
            cache.reorder_cache(order)
            cache.reorder_cache(order)
            valid = mask[:, piece].bool()
            assert_close(out.logits[valid], complete.logits[:, piece][valid], **exact)
    assert_close(out.memory, complete.memory, **exact)


def test_a_name_belongs_to_one_class():
    class Other(GatedDecay):
        pass

    sentence = r"memory_rule='gated_decay' of .*Other is already registered by gated_decay.GatedDecay"
    with pytest.raises(ValueError, match=sentence):
        register_memory_rule(Other())
    register_memory_rule(GatedDecay())
    assert type(RULES["gated_decay"]) is GatedDecay


def test_an_unknown_rule_is_rejected_with_the_known_ones():
    known = "delta, .*gated_decay, gated_delta, linear, softmax"
    with pytest.raises(ValueError, match=rf"memory_rule='hebb' is not one of .*{known}"):
        InfiniGPTNeoConfig(**TINY, memory_rule="hebb")
