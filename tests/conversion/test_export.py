"""Exported folders: each runs its own code, the examples of its card run, and tools read its tokenizer and settings."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from alone import run_alone
from harness import ROOT
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

from data_prep.tokenizer import END_OF_TEXT, make_word_tokenizer
from infini_ds.conversion.card import format_card
from infini_ds.conversion.export import LONGEST_TEXT, write_folder
from infini_ds.conversion.gpt_neo import from_gpt_neo
from infini_ds.conversion.locate import load_model, locate
from infini_ds.conversion.model_code import MODEL, write_code
from infini_ds.evaluation.model_loading import model_sha256
from infini_ds.model import InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.utils.errors import UserError

WORDS = ["import", "a", "b", "c", "d"]
SHAPE = {"vocab_size": 16, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 16}
SHAPE |= {"max_position_embeddings": 16, "attention_types": [[["global", "local"], 1]]}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 0}


def make_tokenizer(template: str | None = None, without: tuple[str, ...] = ()):
    """Return a tokenizer of a few words that adds special tokens by `template`, and lacks some roles of them."""
    tokenizer = make_word_tokenizer(WORDS)
    if template is not None:
        processor = TemplateProcessing(single=template, special_tokens=[(END_OF_TEXT, 0), ("<|pad|>", 1)])
        tokenizer.backend_tokenizer.post_processor = processor
    for role in without:
        setattr(tokenizer, role, None)
    return tokenizer


TOKENIZERS = {
    "plain": make_tokenizer(),
    "adds_start": make_tokenizer(f"{END_OF_TEXT} $A"),
    "adds_both": make_tokenizer(f"{END_OF_TEXT} $A <|pad|>"),
    "no_start_token": make_tokenizer(without=("bos_token", "pad_token")),
}


def write_export(out: Path, tokenizer=None, **fields) -> Path:
    torch.manual_seed(0)
    config = InfiniGPTNeoConfig(**(SHAPE | fields), segment_length=8)
    model, folder = InfiniGPTNeoForCausalLM(config), None
    if tokenizer is not None:
        folder = out.with_name(out.name + "-tokenizer")
        tokenizer.save_pretrained(folder)
    write_folder(model, folder, out, format_card("a", config, "", out.name, folder is not None))
    return out


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """An export with each of the tokenizers, one without a tokenizer, and one of a GPT-Neo."""
    folder = tmp_path_factory.mktemp("exports")
    found = {name: write_export(folder / name / "export", each) for name, each in TOKENIZERS.items()}
    found["no tokenizer"] = write_export(folder / "no tokenizer" / "my export")
    GPTNeoForCausalLM(GPTNeoConfig(**SHAPE)).save_pretrained(folder / "gpt-neo")
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder / "gpt-neo")
    (folder / "converted").mkdir()
    from_gpt_neo(str(folder / "gpt-neo"), folder / "converted" / "infini", 8, "closed")
    return found | {"converted": folder / "converted" / "infini"}


def python_blocks(file: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_every_example_of_a_card_runs_and_begins_with_one_start_token(exports, tmp_path):
    """In a process that cannot import the project, in the folder that holds the export; and the README's example."""
    readme = tmp_path / "clone" / "runs" / "tiny-cpu" / "export"
    shutil.copytree(exports["adds_start"], readme)
    examples = [[str(folder.parent), "".join(python_blocks(folder / "README.md"))] for folder in exports.values()]
    examples += [
        [str(tmp_path / "clone"), block] for block in python_blocks(ROOT / "README.md") if "AutoModel" in block
    ]
    assert len(examples) == len(exports) + 1
    program = """
import json, os
for folder, block in json.loads(sys.argv[1]):
    os.chdir(folder)
    names = {}
    exec(block, names)
    print("RESULT", json.dumps([names["prompt"].tolist(), names["output"].tolist()]))
"""
    shown = run_alone(program, json.dumps(examples), cwd=tmp_path, cache=tmp_path / "cache")
    results = [json.loads(line.removeprefix("RESULT ")) for line in shown.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(examples)
    for [_, block], [(prompt,), (output,)] in zip(examples, results, strict=True):
        expected = [0, 2] if "tokenizer.encode" in block else [0, 1, 2, 3]  # the start token, `import`
        assert prompt == expected and output[: len(prompt)] == prompt and len(output) > len(prompt)
    assert "[y/N]" not in shown and "trust_remote_code" not in shown, "transformers asks no question"
    assert "warn" not in shown.lower(), shown


def test_a_tokenizer_loads_without_a_question(exports, tmp_path):
    """transformers 5 loads the model's configuration first, which is code of the folder: it asks unless it is told."""
    program = """
from transformers import AutoTokenizer, PreTrainedTokenizerFast

for tokenizer in (
    AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True),
    AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False),
    PreTrainedTokenizerFast.from_pretrained(sys.argv[1]),
):
    print("LOADED", tokenizer.encode("import a"), tokenizer.padding_side)
"""
    shown = run_alone(program, exports["adds_start"], cwd=tmp_path, cache=tmp_path / "cache")
    assert shown.count("LOADED [0, 2, 3] left\n") == 3 and "[y/N]" not in shown, shown


def test_tokenizers_of_exports_pad_on_the_left_without_a_limit_and_without_token_types(exports):
    for name, folder in exports.items():
        if name == "no tokenizer":
            continue
        tokenizer = AutoTokenizer.from_pretrained(folder)
        batch = tokenizer(["import a", "b"], padding=True, return_tensors="pt", add_special_tokens=False)
        assert set(batch) == {"input_ids", "attention_mask"}, name
        assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]] and batch["input_ids"][1, 1] == 4
        assert len(tokenizer("a " * 3000, truncation=True)["input_ids"]) >= 3000, "there is no longest text"
        model = load_model(locate(folder))
        with torch.no_grad():
            generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
            alone = model.generate(batch["input_ids"][1:, 1:], max_new_tokens=4, do_sample=False)
        assert generated[1, 2:].tolist() == alone[0, 1:].tolist(), "padding changes nothing"


def test_tools_read_that_length_is_unlimited(exports):
    """As lm-evaluation-harness looks for a model's longest text: the first of these attributes that the model has."""
    for folder in exports.values():
        config = json.loads((folder / "config.json").read_text())
        longest = next(config[name] for name in ("n_positions", "max_position_embeddings", "n_ctx") if name in config)
        assert longest == LONGEST_TEXT and config["max_position_embeddings"] == 16
        assert "length of a text is not limited" in (folder / "README.md").read_text()
    config = InfiniGPTNeoConfig(**SHAPE, segment_length=8)
    torch.manual_seed(0)
    assert model_sha256(InfiniGPTNeoForCausalLM(config)) == model_sha256(load_model(locate(exports["plain"])))


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_permissions_of_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        out = write_export(tmp_path / "export", make_tokenizer())
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in out.rglob("*")}
    assert "model.safetensors" in modes and "tokenizer.json" in modes
    assert set(modes.values()) == {0o666 & ~umask}, modes
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> list[Path]:
    """Six exports named `export`, whose code multiplies the logits by 1 to 6; a file that is not imported directly
    differs.
    """
    folder, exports = tmp_path_factory.mktemp("versions"), []
    first = write_export(folder / "1" / "export")
    for factor in range(1, 7):
        out = first if factor == 1 else folder / str(factor) / "export"
        if factor > 1:
            source = folder / f"source-{factor}"
            shutil.copytree(MODEL, source)
            with (source / "layers.py").open("a") as file:
                file.write(f"\n\nInfiniLayer.FACTOR = {factor}\n")
            shutil.copytree(first, out, ignore=shutil.ignore_patterns("*.py"))
            config = json.loads((out / "config.json").read_text()) | {"auto_map": write_code(out, source)}
            (out / "config.json").write_text(json.dumps(config))
        exports.append(out)
    return exports


LOAD = """
import sys, threading
from transformers import AutoModelForCausalLM

def factor(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return getattr(type(model.transformer.h[0]), "FACTOR", 1), type(model).__name__
"""


def test_exports_of_one_name_run_their_own_code_in_one_process(versions, tmp_path):
    program = (
        LOAD
        + """
print([factor(folder) for folder in sys.argv[1:]])
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
model.save_pretrained("again/export")  # with its code
print(factor("again/export"))
"""
    )
    shown = run_alone(program, *versions[:3], versions[0], cwd=tmp_path, cache=tmp_path / "cache")
    name = "InfiniGPTNeoForCausalLM"
    assert str([(1, name), (2, name), (3, name), (1, name)]) in shown and f"(2, '{name}')\n" in shown
    saved = {file.name for file in (tmp_path / "again" / "export").glob("*.py")}
    assert saved == {file.name for file in versions[1].glob("*.py")}


def test_exports_of_one_name_run_their_own_code_in_six_processes_at_once(versions, tmp_path):
    program = (
        LOAD
        + """
import os
sys.stdout.flush()
children = []
for number, folder in enumerate(sys.argv[1:], start=1):
    child = os.fork()
    if child == 0:
        found = None
        try:
            found = factor(folder)[0]
        finally:
            os._exit(0 if found == number else 1)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print("CODES", codes)
"""
    )
    shown = run_alone(program, *versions, cwd=tmp_path, cache=tmp_path / "cache")
    assert f"CODES {[0] * 6}" in shown, shown


def test_exports_of_earlier_versions_load_and_are_replaced(tmp_path):
    """Their code has names without a hash, and config.json no n_positions."""
    out = write_export(tmp_path / "export")
    for file in out.glob("*.py"):
        name, _, _ = file.stem.rpartition("_")
        text = re.sub(r"(from \.\w+)_[0-9a-f]{10} import", r"\1 import", file.read_text())
        (out / f"{name}.py").write_text(text)
        file.unlink()
    config = json.loads((out / "config.json").read_text())
    del config["n_positions"]
    config["auto_map"] = {
        "AutoConfig": "configuration.InfiniGPTNeoConfig",
        "AutoModelForCausalLM": "modeling.InfiniGPTNeoForCausalLM",
    }
    (out / "config.json").write_text(json.dumps(config))
    shown = run_alone(LOAD + "print(factor(sys.argv[1]))", out, cwd=tmp_path, cache=tmp_path / "cache")
    assert "(1, 'InfiniGPTNeoForCausalLM')" in shown
    before = load_model(locate(out)).state_dict()
    write_export(out)
    after = load_model(locate(out)).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (out / "modeling.py").exists()


@pytest.mark.parametrize("name", [".git", "checkpoints"])
def test_an_export_with_folders_of_its_users_is_not_replaced(name, tmp_path):
    out = write_export(tmp_path / "export")
    (out / name).mkdir()
    with pytest.raises(UserError, match=r"export holds other files: choose another folder"):
        write_export(out)
    assert (out / name).is_dir()
