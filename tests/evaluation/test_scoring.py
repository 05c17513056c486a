"""Scores of tokens and answers: memory swaps, windows of external models, greedy decoding, batches."""

from dataclasses import replace

import pytest
import torch
from reference import random_ids, tiny_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from infini_ds.data.batches import pad_documents
from infini_ds.evaluation.scoring import greedy_answers, token_losses


def test_other_is_the_models_memory_of():
    """Also for rows with padding and several documents."""
    model = tiny_model(3, torch.float32)
    ids, others = random_ids(2, 21, 1), random_ids(2, 21, 2)
    own = pad_documents([ids[0].tolist(), ids[1, :13].tolist()])
    other = pad_documents([others[0, :17].tolist(), others[1].tolist()])
    other = replace(other, document_ids=torch.zeros_like(other.input_ids))
    other.document_ids[0, 9:] = 1
    losses = token_losses(model, own, "other", other)
    for row in range(2):
        (pair,) = (own[row : row + 1] + other[row : row + 1]).micro_batches(2, "cpu")
        alone = model(**pair, memory_of=torch.tensor([1, 1]), loss_reduction="none").loss[0]
        assert_close(losses[row], alone)
    assert not torch.allclose(losses, token_losses(model, own))


def test_an_external_model_reads_each_document_in_windows(gpt2):
    model = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    ids = torch.randint(1, 512, (2, 61), generator=torch.Generator().manual_seed(0))
    batch = pad_documents([ids[0].tolist(), ids[1, :40].tolist()])
    batch = replace(batch, document_ids=torch.zeros_like(batch.input_ids))
    batch.document_ids[0, 30:] = 1
    losses = token_losses(model, batch)
    windows = {0: [(0, 24), (24, 30), (30, 54), (54, 61)], 1: [(0, 24), (24, 40)]}
    for row, spans in windows.items():
        length = int(batch.full_attention_mask()[row].sum())
        for begin, end in spans:
            with torch.no_grad():
                log_p = model(ids[row : row + 1, begin:end]).logits[0].log_softmax(-1)
            for t in range(begin, min(end, length - 1)):
                assert losses[row, t].item() == pytest.approx(-log_p[t - begin, ids[row, t + 1]].item(), abs=1e-5)
    assert (losses[1, 39:] == 0).all()


def test_an_answer_is_correct_if_greedy_decoding_gives_it(gpt2):
    """Answers of which some are what the model generates itself, in rows of different lengths."""
    tiny, external = tiny_model(4, torch.float32), AutoModelForCausalLM.from_pretrained(gpt2).eval()
    for model, T in ((tiny, 30), (external, 12)):
        rows, answers, expected = [], [], []
        for seed in range(6):
            prompt = random_ids(1, T - seed, seed)
            generated = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)[0]
            ids = generated.tolist()
            changed = seed % 3  # the generated token to replace, if any
            if changed:
                ids[T - seed + changed] = ids[T - seed + changed] % 18 + 1
            rows.append(ids)
            answers.append([(T - seed, T - seed + 1), (T - seed, T - seed + 3)])
            expected.append([True, not changed])
        assert greedy_answers(model, pad_documents(rows), answers) == expected
