"""The arguments and settings that transformers, its Trainer, PEFT and TRL give to every model."""

import pytest
import torch
from reference import TINY, random_ids, reference_forward, tiny_model, writer
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import nested_concat, nested_detach

from infini_ds.model import (
    InfiniCache,
    InfiniGPTNeoConfig,
    InfiniGPTNeoForSequenceClassification,
)
from infini_ds.model.modeling import InfiniGPTNeoModel

exact = {"rtol": 1e-9, "atol": 1e-11}
S = TINY["segment_length"]


def classifier():
    torch.manual_seed(3)
    return InfiniGPTNeoForSequenceClassification(InfiniGPTNeoConfig(**TINY, num_labels=3)).double().eval()


def models():
    model = tiny_model()
    return [model, model.transformer, classifier()]


# ---- switches


def test_return_dict_false_gives_a_tuple_in_the_order_of_transformers():
    model, ids = tiny_model(), random_ids(2, 9)
    out = model(ids, labels=ids)
    loss, logits = model(ids, labels=ids, return_dict=False)
    assert_close((loss, logits), (out.loss, out.logits), **exact)
    loss, logits, cache, hidden = model(ids, labels=ids, return_dict=False, use_cache=True, output_hidden_states=True)
    assert_close((loss, logits), (out.loss, out.logits), **exact)
    assert isinstance(cache, InfiniCache) and len(hidden) == TINY["num_layers"] + 1
    loss, logits = model.train()(ids, labels=ids, return_dict=False)  # places do not depend on the mode
    assert_close((loss, logits), (out.loss, out.logits), **exact)
    (last,) = model.transformer.eval()(ids, return_dict=False)
    assert_close(model.lm_head(last), out.logits, **exact)
    head = classifier()
    loss, logits = head(ids, labels=torch.tensor([0, 2]), return_dict=False)
    assert logits.shape == (2, 3) and loss.ndim == 0


def test_the_configuration_switches_return_dict():
    for model in models():
        model.config.return_dict = False
        assert isinstance(model(random_ids(2, 9)), tuple)
        assert hasattr(model(random_ids(2, 9), return_dict=True), "memory")


def test_the_configuration_switches_use_cache():
    assert InfiniGPTNeoConfig().use_cache is True  # GPT-Neo's
    model, ids = tiny_model(use_cache=True), random_ids(2, 9)
    cache = model(ids).past_key_values
    assert isinstance(cache, InfiniCache)
    assert isinstance(model.transformer(ids).past_key_values, InfiniCache)
    more = random_ids(2, 5)
    with torch.no_grad():
        assert_close(model(more, past_key_values=cache).logits, model(torch.cat([ids, more], 1)).logits[:, 9:], **exact)
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, labels=ids).past_key_values is None  # a loss alone needs none
    assert model.train()(ids).past_key_values is None
    model.config.use_cache = False
    assert model.eval()(ids).past_key_values is None


def test_memory_of_the_output_is_that_of_full_segments_with_a_cache_and_of_all_tokens_without_one():
    """The open segment is not written before it is full: more tokens may join it, and a token would cost a write."""
    model, ids = tiny_model(use_cache=True), random_ids(2, 2 * S + 3)
    for switch, tokens in ({}, 2 * S), ({"use_cache": True}, 2 * S), ({"use_cache": False}, 2 * S + 3):
        with torch.no_grad():
            M, z = reference_forward(model, ids[:, :tokens])[1:]
            memory = model(ids, **switch).memory
        assert_close(torch.stack([state.M for state in memory]), M, **exact)
        assert_close(torch.stack([state.z for state in memory]), z, **exact)


# ---- hidden states, attentions


@pytest.mark.parametrize("mode", ["at once", "in blocks", "in pieces", "checkpointed"])
def test_hidden_states_of_all_tokens_in_order(mode):
    model, ids = tiny_model(segments_per_block=2 if mode != "at once" else None), random_ids(2, 5 * S + 2)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 4:7] = mask[1, -2:] = 0
    if mode == "checkpointed":
        model.train().gradient_checkpointing_enable()
    if mode == "in pieces":
        cache, parts = None, []
        for piece in ids.split([S + 1, 1, 2, 4 * S - 2], dim=1):
            start = 0 if cache is None else cache.columns
            out = model(
                piece,
                mask[:, start : start + piece.shape[1]],
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=True,
            )
            cache = out.past_key_values
            parts.append(out.hidden_states)
        hidden = [torch.cat(of_pieces, dim=1) for of_pieces in zip(*parts, strict=True)]
    else:
        hidden = list(model(ids, mask, output_hidden_states=True).hidden_states)
    assert len(hidden) == TINY["num_layers"] + 1
    assert all(not x[mask == 0].any() for x in hidden)
    valid = mask.bool()
    # The embeddings: each token's, and that of its position in its segment.
    position = (mask.cumsum(1) - 1) % S
    embeds = model.transformer.wte(ids) + model.transformer.wpe(position)
    assert_close(hidden[0][valid], embeds[valid], **exact)
    # The last: what the output layer gets.
    logits, _, _ = reference_forward(model, ids, mask)
    assert_close(model.lm_head(hidden[-1])[valid], logits[valid], **exact)
    # Those between: what each layer returned. A model of fewer layers has the same ones.
    shorter = tiny_model(num_layers=1, attention_types=[[["global"], 1]])
    weights = {name: x for name, x in model.state_dict().items() if ".h.1." not in name}
    weights |= {
        "transformer.ln_f.weight": torch.ones(TINY["hidden_size"]),
        "transformer.ln_f.bias": torch.zeros(TINY["hidden_size"]),
    }
    shorter.load_state_dict(weights)
    shorter.transformer.ln_f = torch.nn.Identity()
    assert_close(hidden[1][valid], shorter.transformer(ids, mask).last_hidden_state[valid], **exact)


def test_hidden_states_have_gradients_under_checkpointing():
    ids, gradients = random_ids(2, 5 * S), []
    for checkpointing in (False, True):
        model = tiny_model(segments_per_block=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        hidden = model(ids, output_hidden_states=True).hidden_states
        sum((x * (i + 1)).square().sum() for i, x in enumerate(hidden)).backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    assert_close(*gradients, **exact)


def test_hidden_states_by_configuration_and_in_generate():
    ids = random_ids(2, 9)
    for model in models():
        model.config.output_hidden_states = False
        assert model(ids).hidden_states is None
        model.config.output_hidden_states = True
        assert len(model(ids).hidden_states) == TINY["num_layers"] + 1
    model = tiny_model()
    out = model.generate(ids, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True, pad_token_id=0)
    assert [step[-1].shape[1] for step in out.hidden_states] == [9, 1, 1]


def test_attentions_are_refused_with_the_reason():
    for model in models():
        with pytest.raises(ValueError, match=r"output_attentions=True is not possible: .* fused .* probabilities"):
            model(random_ids(2, 9), output_attentions=True)


# ---- embeddings


@pytest.mark.parametrize("checkpointing", [False, True])
def test_embeddings_in_place_of_ids(checkpointing):
    """Same loss, and a gradient for the embeddings, which prompt tuning needs."""
    ids = random_ids(2, 5 * S + 1)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 4:7] = 0
    results = []
    for given in ("ids", "embeds"):
        model = tiny_model(segments_per_block=2, tie_word_embeddings=False).train()
        if checkpointing and given == "embeds":
            model.gradient_checkpointing_enable()
        if given == "ids":
            loss = model(ids, mask, labels=ids).loss
        else:
            embeds = model.transformer.wte(ids).detach().requires_grad_()
            loss = model(inputs_embeds=embeds, attention_mask=mask, labels=ids).loss
        loss.backward()
        if given == "embeds":
            model.transformer.wte(ids).backward(embeds.grad)
        results.append((loss, {name: x.grad for name, x in model.named_parameters()}))
    wte = "transformer.wte.weight"
    (want_loss, want), (loss, got) = results
    assert_close(loss, want_loss, **exact)
    assert_close(got, want, **exact)
    assert got[wte].abs().sum() > 0


def test_embeddings_of_a_classifier():
    model, ids = classifier(), random_ids(2, 2 * S + 1)
    assert_close(model(inputs_embeds=model.transformer.wte(ids)).logits, model(ids).logits, **exact)


def test_ids_and_embeddings_exclude_each_other():
    for model in models():
        ids = random_ids(2, 9)
        embeds = model.get_input_embeddings()(ids)
        for given in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
            with pytest.raises(ValueError, match=r"either input_ids .* or inputs_embeds"):
                model(**given)
        with pytest.raises(ValueError, match=r"input_ids of shape \(9,\) must be"):
            model(ids[0])


# ---- token types, masks, positions


def test_token_types_are_ignored_if_they_are_0():
    ids = random_ids(2, 9)
    for model in models():
        assert_close(model(ids, token_type_ids=torch.zeros_like(ids))[0], model(ids)[0], **exact)
        with pytest.raises(ValueError, match="token_type_ids other than 0 have no meaning"):
            model(ids, token_type_ids=torch.ones_like(ids))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    model = writer()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**tokens, **options), model.generate(ids, **options))


@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (2, 9, 9), (2, 8), (2, 10), (1, 9)])
def test_masks_of_other_shapes_are_refused(shape):
    for model in models():
        with pytest.raises(ValueError, match=r"attention_mask of shape \(" + ", ".join(map(str, shape))):
            model(random_ids(2, 9), attention_mask=torch.ones(shape))


def test_own_positions_are_ignored():
    model, ids = tiny_model(), random_ids(2, 2 * S + 1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    want = model(ids, mask).logits
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    for positions in (counted, torch.arange(ids.shape[1])[None]):
        assert_close(model(ids, mask, position_ids=positions).logits, want, **exact)
        with torch.no_grad():
            cache = model(ids[:, :7], mask[:, :7], position_ids=positions[:, :7], use_cache=True).past_key_values
            got = model(ids[:, 7:], mask, position_ids=positions[:, 7:], past_key_values=cache).logits
        assert_close(got, want[:, 7:], **exact)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(model.generate(ids, position_ids=counted, **options), model.generate(ids, **options))


def test_positions_that_restart_are_documents():
    """As TRL's packing gives them, without an attention mask."""
    model, lengths = tiny_model(), (5, 2 * S + 1, 1, 7)
    ids = random_ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    logits = model(ids, position_ids=positions).logits
    assert_close(logits, model(ids, document_ids=documents).logits, **exact)
    # The documents are apart: the last one gives what it gives alone, here within its own segment.
    other = ids.clone()
    other[:, :5] = (other[:, :5] + 1) % model.config.vocab_size
    changed = model(other, position_ids=positions).logits
    assert_close(changed[:, 5:], logits[:, 5:], **exact)
    assert not torch.allclose(changed[:, :5], logits[:, :5])


def test_what_collators_pass_beside_positions_is_ignored():
    """As TRL's packing and transformers' DataCollatorWithFlattening pass it for other kinds of attention."""
    lengths = (5, 2 * S + 1, 7)
    ids, borders = random_ids(1, sum(lengths)), torch.tensor([0, *lengths]).cumsum(0).int()
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packing = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "seq_idx": documents.int()}
    packing |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    for model in models():
        want = model(ids, position_ids=positions)[0]
        assert_close(model(ids, position_ids=positions, **packing)[0], want, **exact)
        for name, value in packing.items():
            with pytest.raises(TypeError, match=f"{name} is ignored by this model, which learns from position_ids"):
                model(ids, **{name: value})


@pytest.mark.parametrize("positions", [[5, 6, 7, 8], [0, 2, 4, 6], [3, 2, 1, 0], [0, 1, 1, 2], [1, 2, 0, 1]])
def test_other_positions_are_refused(positions):
    with pytest.raises(ValueError, match="counts positions from the start of each segment"):
        tiny_model()(random_ids(1, 4), position_ids=torch.tensor([positions]))


def test_a_misspelled_argument_is_an_error():
    for model in models():
        with pytest.raises(TypeError, match="no argument atention_mask"):
            model(random_ids(2, 9), atention_mask=torch.ones(2, 9))
        model(random_ids(2, 9), return_dict=True, output_attentions=False, cache_position=None)


# ---- the Trainer


@pytest.mark.parametrize("kind", ["language", "classes"])
def test_predictions_to_gather_are_logits_alone(kind):
    """What the Trainer's prediction step does with an output, and its loop with two of them."""
    model, gathered, want = tiny_model(use_cache=True) if kind == "language" else classifier(), None, []
    for _ in range(2):
        ids = random_ids(2, 9)
        out = model(ids, labels=ids if kind == "language" else torch.tensor([0, 2]))
        ignored = [*model.config.keys_to_ignore_at_inference, "loss"]
        logits = nested_detach(tuple(value for name, value in out.items() if name not in ignored))
        gathered = logits if gathered is None else nested_concat(gathered, logits)
        want.append(model(ids).logits)
    assert_close(gathered, (torch.cat(want),), **exact)


@pytest.mark.parametrize("kind", ["language", "classes"])
def test_predict_and_evaluate_of_the_trainer(kind, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate, which the lock file leaves out")
    model = (tiny_model(use_cache=True) if kind == "language" else classifier()).float()
    ids = random_ids(5, 9)
    labels = ids if kind == "language" else torch.tensor([0, 2, 1, 0, 1])
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True),
        eval_dataset=rows,
        compute_metrics=lambda prediction: {"mean": float(prediction.predictions.mean())},
    )
    with torch.no_grad():
        want = model(ids).logits
    assert_close(torch.from_numpy(trainer.predict(rows).predictions), want)
    assert trainer.evaluate()["eval_mean"] == pytest.approx(want.mean().item(), rel=1e-4)


def test_loading_without_the_output_layer(tmp_path):
    model, ids = tiny_model(tie_word_embeddings=False), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    base, info = InfiniGPTNeoModel.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(base(ids).last_hidden_state, model.transformer(ids).last_hidden_state, **exact)
