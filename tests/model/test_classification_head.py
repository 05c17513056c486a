"""The classification head against GPT-Neo's and against the causal model's body."""

import pytest
import torch
import torch.nn.functional as F
from reference import TINY, random_ids, tiny_model
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, GPTNeoConfig, GPTNeoForSequenceClassification

from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForSequenceClassification

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def classifier(labels: int = 3, **fields) -> InfiniGPTNeoForSequenceClassification:
    """A tiny model in fp64 with random weights, gates and head."""
    body = tiny_model(**fields)
    body.config.num_labels = labels
    model = InfiniGPTNeoForSequenceClassification(body.config).double()
    model.transformer.load_state_dict(body.transformer.state_dict())
    model.block_schedule = body.block_schedule
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.mark.parametrize(
    ("labels", "problem", "targets"),
    [
        (3, "single_label_classification", torch.tensor([2, 0, 1])),
        (1, "regression", torch.tensor([0.3, -1.0, 2.0])),
        (3, "multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])),
    ],
)
def test_one_segment_is_gpt_neos_classifier(tmp_path, labels, problem, targets):
    """The same logits, loss and gradients with weights that GPT-Neo saved, for each type of labels."""
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "num_heads": 2, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    config = GPTNeoConfig(
        vocab_size=50, max_position_embeddings=16, window_size=4, num_labels=labels, pad_token_id=0, **layers
    )
    theirs = GPTNeoForSequenceClassification(config)
    theirs.save_pretrained(tmp_path)
    ours = InfiniGPTNeoForSequenceClassification.from_pretrained(tmp_path, segment_length=16)
    ids = random_ids(3, 11)
    ids[1, 7:] = 0
    results = []
    for model in (theirs, ours):
        out = model(ids, attention_mask=(ids != 0).long(), labels=targets)
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "beta" not in name}
        results.append((out.logits, out.loss, grads))
        assert model.config.problem_type == problem
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert len(results[0][2]) == len(dict(theirs.named_parameters()))


@pytest.mark.parametrize("segments_per_block", [None, 2])
def test_padding_on_either_side_has_no_effect(segments_per_block):
    model, lengths, T = classifier(segments_per_block=segments_per_block), (1, 4, 11, 14), 14
    rows = [random_ids(1, length, seed=length) for length in lengths]
    with torch.no_grad():
        alone = torch.cat([model(row).logits for row in rows])
        for side in (lambda gap: (gap, 0), lambda gap: (0, gap), lambda gap: (gap // 2, gap - gap // 2)):
            ids, mask = (
                torch.cat([F.pad(x, side(T - x.shape[1]), value=pad) for x in tensors])
                for tensors, pad in ((rows, 7), ([torch.ones_like(row) for row in rows], 0))
            )
            assert_close(model(ids, attention_mask=mask).logits, alone, **EXACT)
        assert (model(ids, attention_mask=torch.zeros_like(mask)).logits == 0).all()


def test_the_memory_is_read_and_its_gates_have_gradients():
    """The first token changes the logits of a text of four segments only through the memory."""
    model, ids = classifier(), random_ids(2, 15)
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % model.config.vocab_size
    with torch.no_grad():
        assert (model(ids).logits - model(other).logits).abs().max() > 1e-4
        assert torch.equal(model(ids, use_memory=False).logits, model(other, use_memory=False).logits)
    model(ids, labels=torch.tensor([0, 2])).loss.backward()
    assert all((layer.attention.beta.grad != 0).all() for layer in model.transformer.h)


@pytest.mark.parametrize("options", [{}, {"checkpoint_layers": True}, {"offload_states": True}])
def test_gradient_checkpointing_changes_nothing(options):
    ids, targets = random_ids(2, 15), torch.tensor([0, 2])
    grads = []
    for model in (classifier(), classifier(segments_per_block=1, **options)):
        if grads:
            model.gradient_checkpointing_enable()
        model.train()(ids, labels=targets).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(grads[1], grads[0], **EXACT)


def test_losses_of_micro_batches_add_up():
    model, ids, targets = classifier(), random_ids(5, 9), torch.tensor([0, 2, 1, 1, 0])
    with torch.no_grad():
        all_rows = model(ids, labels=targets).loss
        parts = [
            model(ids[rows], labels=targets[rows], num_items_in_batch=5).loss for rows in (slice(0, 2), slice(2, 5))
        ]
    assert_close(sum(parts), all_rows, **EXACT)


def test_a_language_model_is_loaded_with_a_new_head(tmp_path):
    body = tiny_model(dtype=torch.float32)
    body.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert type(model) is InfiniGPTNeoForSequenceClassification
    assert_close(model.transformer.state_dict(), body.transformer.state_dict(), rtol=0, atol=0)
    assert model.score.weight.shape == (4, body.config.hidden_size) and model.score.bias is None
    model.save_pretrained(tmp_path / "fine-tuned")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fine-tuned")
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    config = InfiniGPTNeoConfig(**TINY, num_labels=2)
    assert type(AutoModelForSequenceClassification.from_config(config)) is InfiniGPTNeoForSequenceClassification


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="lables"):
        classifier()(random_ids(1, 5), lables=torch.tensor([0]))
