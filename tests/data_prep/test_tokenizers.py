"""Tokenizers that are loaded, and those that cannot be used."""

import json
import os

import pytest
from preparing import SMALL, assert_fails
from transformers import AutoTokenizer

from data_prep.prepare import PrepareOptions, load_manifest, prepare


@pytest.mark.parametrize("files", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_gpt2_style_folder_without_tokenizer_config(prepared, folder, tmp_path, files):
    """As GPT-2 was published: `<|endoftext|>` only in the vocabulary, merges.txt without a version line."""
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    spec = json.loads((prepared / "tokenizer" / "tokenizer.json").read_text())
    if "vocab.json" in files:
        (gpt2 / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
        (gpt2 / "merges.txt").write_text("".join(" ".join(pair) + "\n" for pair in spec["model"]["merges"]))
    else:
        spec["truncation"] = {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
        (gpt2 / "tokenizer.json").write_text(json.dumps(spec))
    options = SMALL | {"source": f"text:{folder}", "tokenizer": str(gpt2), "out": tmp_path / "out"}
    manifest = prepare(PrepareOptions(**options), quiet=True)
    assert manifest.train == load_manifest(prepared).train and manifest.tokenizer.start_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").eos_token == "<|endoftext|>"


def test_tokenizers_that_cannot_serve(folder, tmp_path, prepared):
    options = SMALL | {"source": f"text:{folder}", "out": tmp_path / "out"}
    (tmp_path / "empty").mkdir()
    assert_fails(["--tokenizer", "neither tokenizer.json"], **options | {"tokenizer": str(tmp_path / "empty")})
    assert_fails(
        ["--tokenizer", "no tokenizer of that name"],
        **options | {"tokenizer": str(tmp_path / "none" / "such" / "x")},
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    spec = (prepared / "tokenizer" / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (bare / "tokenizer.json").write_text(spec)
    assert_fails(["--tokenizer", "no token begins or ends"], **options | {"tokenizer": str(bare)})
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert_fails(["--tokenizer", "no token begins or ends"], **options | {"tokenizer": str(bare)})
    assert_fails(["--vocab-size 90000", "ask for"], **options | {"vocab_size": 90000})
    assert os.listdir(tmp_path) and not (tmp_path / "out").exists()
