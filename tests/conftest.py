"""Fixtures that tests share: a small corpus of real text, its shards, and finished runs."""

import os
import sysconfig
from pathlib import Path

# Before the imports that read them: no hub, and no GPU, since the ranks that tests start have none.
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

import pytest
import torch
from harness import launch_pretrain, pretrain, run_script

from infini_ds.utils.logging import setup_logging

torch.set_num_threads(1)
setup_logging()

MODULES = [
    *("argparse", "ast", "calendar", "configparser", "csv", "difflib", "fractions", "gettext", "heapq", "inspect"),
    *("locale", "optparse", "pickle", "plistlib", "random", "shlex", "statistics", "string", "tarfile", "textwrap"),
]


def pytest_addoption(parser) -> None:
    parser.addoption("--kills", type=int, default=3, help="how often tests/training/test_faults.py kills its job")


def pytest_configure(config) -> None:
    for name in ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "order", "torch_compile_test"):
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")
    config.addinivalue_line("markers", "torch_export_test: of transformers' own tests")


@pytest.fixture(autouse=True)
def messages_on_stdout() -> None:
    """An earlier test's script may have chosen standard error for its messages."""
    setup_logging()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of 20 real texts, modules of the standard library, and a few of a line or two."""
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        (folder / f"{name}.txt").write_text((stdlib / f"{name}.py").read_text(encoding="utf-8")[:30_000])
        (folder / f"{name}-short.txt").write_text(f"The module {name} is part of Python.\n")
    return folder


@pytest.fixture(scope="session")
def shards(corpus, tmp_path_factory) -> Path:
    """The corpus as rows of 256 tokens, vocabulary 512."""
    out = tmp_path_factory.mktemp("data") / "shards"
    options = ["--sequence-length", "256", "--vocab-size", "512", "--validation-fraction", "0.2", "--workers", "1"]
    run_script("-m", "data_prep", "--source", f"text:{corpus}", "--out", out, *options)
    return out


@pytest.fixture(scope="session")
def runs(shards, tmp_path_factory) -> Path:
    """A folder of finished runs of 20 steps: `one`, made by one rank, and `two`, made by two ranks of ZeRO-2."""
    output = tmp_path_factory.mktemp("runs")
    pretrain(shards, output, "one", "validation.every=10")
    done = launch_pretrain(shards, output, "two", "batch.micro_rows=1", "validation.every=10", ranks=2)
    (output / "two" / "output.txt").write_text(done.stdout + done.stderr)
    return output
