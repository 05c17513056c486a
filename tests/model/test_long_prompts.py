"""Prompts of many segments: logits of the last tokens alone, and the memory that a prompt takes."""

import os
import subprocess
import sys

import pytest
import torch
from harness import ROOT
from reference import TINY, random_ids, tiny_model
from torch.testing import assert_close

exact = {"rtol": 1e-12, "atol": 1e-12}
S = TINY["segment_length"]


@pytest.mark.parametrize("kept", [1, 3, S, S + 1, 4 * S, torch.tensor([0]), torch.tensor([-1, 5, 17])], ids=str)
@pytest.mark.parametrize("segments_per_block", [None, 1, 3])
@pytest.mark.parametrize("padding", [0, 2, 2 * S + 1])
def test_logits_of_some_positions(padding, segments_per_block, kept):
    """They are those of all positions, whichever block their tokens are in; also after a cache."""
    model, ids = tiny_model(segments_per_block=segments_per_block), random_ids(2, 5 * S + 2)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    where = slice(-kept, None) if isinstance(kept, int) else kept
    with torch.no_grad():
        want = model(ids, mask).logits[:, where]
        assert_close(model(ids, mask, logits_to_keep=kept).logits, want, **exact)
        cache, twin = (model(ids[:, :3], mask[:, :3], use_cache=True).past_key_values for _ in range(2))
        after = model(ids[:, 3:], mask[:, 3:], past_key_values=twin).logits[:, where]
        got = model(ids[:, 3:], mask[:, 3:], past_key_values=cache, logits_to_keep=kept).logits
        assert_close(got, after, **exact)


@pytest.mark.parametrize("kept", [1, 2, torch.tensor([1, 0]), torch.tensor([-1, -1, 0])], ids=str)
def test_logits_of_some_tokens_of_a_decoding_step(kept):
    model, ids = tiny_model(), random_ids(2, S + 3)
    where = slice(-kept, None) if isinstance(kept, int) else kept
    with torch.no_grad():
        cache = model(ids[:, : S + 1], use_cache=True).past_key_values
        got = model(ids[:, S + 1 :], past_key_values=cache, logits_to_keep=kept).logits
        assert_close(got, model(ids).logits[:, -2:][:, where], **exact)


PROGRAM = """
import torch
from infini_ds.model import InfiniGPTNeoForCausalLM
from infini_ds.model.presets import preset_config

torch.set_num_threads(1)
fields = {"num_layers": 1, "num_heads": 1, "vocab_size": 512, "hidden_size": 64, "segment_length": 64}
model = InfiniGPTNeoForCausalLM(preset_config("tiny", **fields)).eval()
for tokens in (16_384, 16_384, 114_688):
    ids = torch.randint(512, (1, tokens))
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
    status = open("/proc/self/status").read()
    print(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_of_generation_after_a_long_prompt():
    """It grows by ids and masks alone: by less than one hidden state for each token of the prompt."""
    # The C library returns what is freed at once, so that the peak is what is in use, not how its heap is laid out.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    _, short, long = (1024 * int(line) for line in done.stdout.split())
    assert (long - short) / (114_688 - 16_384) < 64 * 4
