"""An export works without this project, with the version of transformers that runs the tests."""

import os

import pytest
import torch
import transformers
from alone import run_alone
from harness import ROOT
from reference import TINY, writer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infini_ds.conversion.export import write_folder

PROGRAM = """
folder, out, project = sys.argv[1:]
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).double()
counts = []
model.transformer.h[0].register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].shape[:2].numel()))
inputs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("b c d e f g h i", return_tensors="pt")
text = model.generate(**inputs, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
assert classifier(inputs["input_ids"]).logits.shape == (1, 3)
cache = model(inputs["input_ids"], use_cache=True).past_key_values
cache.save("text.memory", model)
loaded, question = model.load_cache("text.memory"), inputs["input_ids"][:, :3]
assert loaded.columns == 8 and type(loaded) is type(cache)
done = len(counts)
answer = model.generate(question, past_key_values=loaded.copy(), max_new_tokens=3, do_sample=False, pad_token_id=0)
assert sum(counts[done:]) == 3 + 2, counts  # nothing of the text
assert torch.equal(model(question, past_key_values=loaded).logits, model(question, past_key_values=cache).logits)
try:
    model.float().load_cache("text.memory")
except ValueError as error:
    assert "dtype=float64, and this model has dtype=float32" in str(error)
else:
    raise AssertionError("the cache of another precision was loaded")
counts = counts[: done - 1]  # of the text alone
torch.save({"version": transformers.__version__, "ids": inputs["input_ids"], "text": text, "counts": counts}, out)
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values() if module is not None]
assert not [file for file in files if file.startswith(f"{project}/infini_ds/")]
"""


def test_the_tests_run_with_the_version_that_was_asked_for():
    assert transformers.__version__ == os.environ.get("TESTED_TRANSFORMERS", transformers.__version__)


@pytest.mark.parametrize("fields", [{}, {"short_conv": 2, "embed_conv": 6}], ids=["plain", "convolutions"])
def test_an_export_generates_with_its_cache_in_a_process_of_its_own(fields, tmp_path):
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrs"[: TINY["vocab_size"]])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="a", model_input_names=["input_ids", "attention_mask"]
    ).save_pretrained(tmp_path / "tokenizer")
    model = writer(dtype=torch.float32, **fields)
    write_folder(model, tmp_path / "tokenizer", tmp_path / "folder", "A card.\n")
    run_alone(PROGRAM, tmp_path / "folder", tmp_path / "out.pt", ROOT, cwd=tmp_path, cache=tmp_path / "cache")
    alone = torch.load(tmp_path / "out.pt")
    assert alone["version"] == transformers.__version__
    ids = alone["ids"]
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert alone["counts"] == [8] + [1] * 8  # two segments of the prompt, then one token a step
    model.double()
    for _ in range(9):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(alone["text"], ids)
