"""The cache: a text in pieces, constant size, rows of different lengths."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from reference import TINY, random_ids, reference_forward, tiny_model, writer
from strategies import logits_in_pieces, texts_in_pieces
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from infini_ds.model import BlockSchedule, InfiniCache

many = settings(deadline=None, max_examples=60, derandomize=True)
exact = {"rtol": 1e-9, "atol": 1e-11}
S = TINY["segment_length"]


@given(texts_in_pieces())
@many
def test_a_text_in_pieces_equals_the_text_at_once(text):
    model, ids, mask, documents, _ = text
    with torch.no_grad():
        complete = model(ids, mask, documents).logits
        logits, cache = logits_in_pieces(*text)
        reference = reference_forward(model, ids, mask, documents)[0]
    valid = mask.bool()
    assert_close(logits[valid], complete[valid], **exact)
    assert_close(complete[valid], reference[valid], **exact)
    assert cache.get_seq_length() == ids.shape[1]


@given(texts_in_pieces())
@many
def test_labels_of_a_piece_are_predicted_from_the_piece(text):
    """Cached tokens predict nothing again, and padding is not a label."""
    model, ids, mask, documents, pieces = text
    cache = None
    with torch.no_grad():
        for piece in pieces:
            inputs = (ids[:, piece], mask[:, piece], None if documents is None else documents[:, piece])
            labels = ids[:, piece]
            out = model(*inputs, labels=labels, past_key_values=cache, use_cache=True, loss_reduction="sum")
            cache = out.past_key_values
            want = torch.zeros((), dtype=out.logits.dtype)
            for b in range(len(ids)):
                columns = mask[b, piece].nonzero().flatten()
                want += F.cross_entropy(out.logits[b, columns[:-1]], labels[b, columns[1:]], reduction="sum")
            assert_close(out.loss, want, **exact)


@pytest.mark.parametrize("position_embedding", ["segment", "rotary"])
@pytest.mark.parametrize("pieces", [[23], [1] * 23, [3, 1, 4, 15], [4, 4, 15], [5, 5, 13]])
def test_autocast_continues_from_a_cache(position_embedding, pieces):
    model, ids = tiny_model(dtype=torch.float32, position_embedding=position_embedding), random_ids(2, 23)
    cache, logits = None, []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(ids).logits
        for piece in ids.split(pieces, dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    assert {x.dtype for layer in cache.layer_caches for x in layer.memory} == {torch.float32}
    assert_close(torch.cat(logits, dim=1), want, rtol=0.02, atol=0.1)


def test_without_document_ids_the_last_document_continues():
    model, ids = tiny_model(), random_ids(1, 15)
    documents = torch.tensor([[2] * 3 + [6] * 12])
    with torch.no_grad():
        cache = model(ids[:, :9], document_ids=documents[:, :9], use_cache=True).past_key_values
        assert_close(
            model(ids[:, 9:], past_key_values=cache).logits, model(ids, document_ids=documents).logits[:, 9:], **exact
        )


def cache_bytes(cache: InfiniCache) -> int:
    tensors = [cache.open_documents, cache.memory_document]
    tensors += [x for layer in cache.layer_caches for x in (*layer.memory, layer.k, layer.v)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def test_the_cache_does_not_grow():
    model, ids = tiny_model(), random_ids(2, 5 * S + 1)
    sizes = set()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        for token in random_ids(2, 40).split(1, dim=1):
            cache = model(token, past_key_values=cache).past_key_values
            sizes.add(cache_bytes(cache))
        assert len(sizes) == 1
        for blocks in (None, 1, 3):  # nor does it keep the intermediate states of a long prompt alive
            model.block_schedule = BlockSchedule(blocks)
            size = cache_bytes(model(random_ids(2, 50 * S + 1), use_cache=True).past_key_values)
            assert size <= max(sizes)


class HostReads(TorchDispatchMode):
    """Counts how often the host reads a number from the device, for which it would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_token_needs_no_synchronization_with_the_device():
    """Not even where a row's open segment is full: the host has counted each row's tokens after the prompt."""
    model, prompt = writer(segment_length=8), random_ids(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        cache = model(prompt, mask, use_cache=True).past_key_values
        assert cache.tokens() == [5, 3]
        for number in range(1, 17):
            with HostReads() as reads:
                model(prompt[:, :1], past_key_values=cache)
            assert reads.count == 0 and cache._tokens == [5 + number, 3 + number]
        assert (cache.open_documents != -1).sum(1).tolist() == [21 % 8, 19 % 8]


def test_a_reset_cache_equals_a_new_one():
    model, ids, other = tiny_model(), random_ids(2, 11, seed=1), random_ids(2, 13, seed=2)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_close(model(other, past_key_values=cache).logits, model(other).logits, **exact)


def test_rows_of_a_cache_can_be_selected_and_repeated():
    model, ids, more = tiny_model(), random_ids(3, 10), random_ids(3, 9, seed=5)
    with torch.no_grad():
        want = model(torch.cat([ids, more], dim=1)).logits[:, 10:]
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([4, 0, 3, 1]))  # rows 2, 0, 1, 0
        rows = [2, 0, 1, 0]
        assert_close(model(more[rows], past_key_values=cache).logits, want[rows], **exact)


def test_a_cache_cannot_be_cropped():
    cache = tiny_model()(random_ids(1, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"cannot forget its last tokens.*generate without an assistant"):
        cache.crop(5)


def test_no_cache_while_training_with_gradient_checkpointing():
    """As in transformers: `use_cache` is set to False, and a cache that is given is refused."""
    model, ids = tiny_model().train(), random_ids(1, 5)
    cache = model(ids, use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    assert model(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="not possible while training with gradient checkpointing"):
        model(ids, past_key_values=cache)
    assert model.eval()(ids, use_cache=True).past_key_values is not None


def test_the_mask_may_cover_all_tokens_since_the_start():
    """The convention of Hugging Face's other models; a mask of the new tokens only means the same."""
    model, ids = tiny_model(), random_ids(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    cache = model(ids[:, :40], attention_mask=mask[:, :40], use_cache=True).past_key_values
    of_all = model(ids[:, 40:], attention_mask=mask, past_key_values=cache).logits
    assert torch.allclose(of_all, model(ids, attention_mask=mask).logits[:, 40:], atol=1e-5)
