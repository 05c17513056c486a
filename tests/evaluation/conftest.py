"""Fixtures of the evaluation tests: an export, an external model, sentence pairs, and finished results."""

import json
from pathlib import Path

import pytest
import torch
from harness import call_script
from transformers import GPT2Config, GPT2LMHeadModel

from infini_ds.conversion.export import export
from infini_ds.conversion.locate import load_tokenizer, locate

PAIRS = [
    ("The module reads a file.", "The module read a files.", "agreement"),
    ("It returns the first of them, if there are any.", "It return the first of them, if there is any.", "agreement"),
    ("Who should they import after reading this?", "Who should they import this after reading?", "islands"),
    ("What does it raise?", "What does raises it?", "islands"),
]
TASKS = ["--tasks", "position", "recall", "blimp", "--rows", "5"]
RECALL = ["--recall", "pairs,queries=2", "passkey,digits=2", "--segments", "0", "2", "--examples", "3"]


@pytest.fixture(scope="session")
def pairs() -> list[tuple[str, str, str]]:
    """(good sentence, bad sentence, phenomenon)"""
    return PAIRS


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> Path:
    """A folder with the pairs as two paradigms in BLiMP's format."""
    folder = tmp_path_factory.mktemp("blimp")
    for phenomenon in ("agreement", "islands"):
        lines = [
            json.dumps({"sentence_good": good, "sentence_bad": bad, "linguistics_term": phenomenon})
            for good, bad, its_phenomenon in PAIRS
            if its_phenomenon == phenomenon
        ]
        (folder / f"{phenomenon}_1.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def exported(runs, tmp_path_factory) -> Path:
    """The run `one` as an export."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(locate(runs / "one"), folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(runs, tmp_path_factory) -> Path:
    """A GPT-2 with random weights and a context of 24 tokens, with the tokenizer of the shards."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    load_tokenizer(locate(runs / "one")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def arguments(runs, sentences) -> list:
    """The arguments that `evaluated` was made with, without its folder."""
    return [runs / "one", *TASKS, *RECALL, "--blimp", sentences]


@pytest.fixture(scope="session")
def evaluated(arguments, tmp_path_factory) -> Path:
    """The folder of results of the run `one`: position, recall and BLiMP."""
    out = tmp_path_factory.mktemp("evaluated") / "one"
    call_script("launch/evaluate.py", *arguments, "--out", out)
    return out


@pytest.fixture(scope="session")
def tasks(evaluated) -> dict:
    """The results in `evaluated`, by task."""
    return json.loads((evaluated / "evaluation.json").read_text())["tasks"]
