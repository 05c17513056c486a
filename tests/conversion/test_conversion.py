"""Conversion: an export works without this project and gives the same logits; GPT-Neo is converted; scripts."""

import json
import math
import subprocess
import sys

import pytest
import torch
from alone import run_alone
from harness import ROOT, call_script, environment, pretrain, run_script
from safetensors.torch import load_file
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from infini_ds.conversion.locate import ModelLocation, load_model, load_tokenizer, locate
from infini_ds.metrics.metric_writers import read_metrics
from infini_ds.model import InfiniGPTNeoForCausalLM

USE = """
import re
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

folder, out, project = sys.argv[1:]
# Loaded first, when transformers 4 has not yet copied the code that the other class of the folder needs.
classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = torch.arange(1, 201).view(2, 100)
text = pipeline("text-generation", model=model, tokenizer=tokenizer)("import", max_new_tokens=40, do_sample=False)
with torch.no_grad():
    state = classifier.transformer(ids, use_cache=False).last_hidden_state[:, -1]
    assert torch.allclose(classifier(ids).logits, classifier.score(state), rtol=0, atol=1e-6)
    assert classifier.score.out_features == 3
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(base).__name__ == "InfiniGPTNeoModel", type(base)
    torch.testing.assert_close(base(ids).last_hidden_state[:, -1], state)
    last = model.lm_head(state)
    torch.save({"logits": model(ids).logits, "last": last, "text": text[0]["generated_text"]}, out)
card = Path(folder, "README.md").read_text()
examples = re.findall("^```python$(.*?)^```$", card, re.MULTILINE | re.DOTALL)
names = {}
exec("".join(examples), names)  # in the folder that holds the export
assert len(examples) == 2 and names["answer"].shape[1] > 3
prompt, output = names["prompt"], names["output"]
assert prompt[0, 0] == 0 and (prompt == 0).sum() == 1 and output.shape[1] > prompt.shape[1]
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values() if module is not None]
assert not [file for file in files if file.startswith((f"{project}/infini_ds/", f"{project}/data_prep/"))]
"""

CLASSES = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")


@pytest.fixture(scope="module")
def exported(runs):
    """The run `one`, exported by the command line to safetensors files of at most 100 kB."""
    out = runs / "one" / "export"
    run_script("launch/convert.py", runs / "one", "--out", out, "--max-shard-size", "100KB")
    return out


def test_an_export_has_all_files_and_a_card(exported):
    shards = list(exported.glob("model-*.safetensors"))
    assert len(shards) > 2 and (exported / "model.safetensors.index.json").exists()
    config = json.loads((exported / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", *CLASSES}
    (suffix,) = {reference.split(".")[0].split("_")[-1] for reference in config["auto_map"].values()}
    assert config["segment_length"] == 32 and config["vocab_size"] == 512
    card = (exported / "README.md").read_text()
    validation = [line for line in read_metrics(exported.parent) if "validation/loss" in line][-1]
    for words in (
        f"{validation['validation/loss']:.4f}",
        "segment_length: 32",
        '"source": "text:',
        "trust_remote_code",
    ):
        assert words in card, words
    assert (exported / "tokenizer.json").exists() and (exported / "generation_config.json").exists()
    code = {path.stem for path in (ROOT / "infini_ds" / "model").glob("*.py")} - {"__init__", "presets"}
    assert {path.name for path in exported.glob("*.py")} == {f"{module}_{suffix}.py" for module in code}


def test_an_export_works_without_this_project(exported, tmp_path):
    """In a new process that cannot import the project. It gives the logits of the checkpoint."""
    run_alone(USE, exported, tmp_path / "out.pt", ROOT, cwd=exported.parent, cache=tmp_path / "cache")
    alone = torch.load(tmp_path / "out.pt")
    model = load_model(locate(exported.parent))
    with torch.no_grad():
        logits = model(torch.arange(1, 201).view(2, 100)).logits
    assert torch.equal(alone["logits"], logits)
    assert torch.allclose(alone["last"], logits[:, -1], rtol=0, atol=1e-5)  # the classifier has the same body
    assert alone["text"].startswith("import") and len(alone["text"]) > 20


def test_export_of_two_ranks_and_in_bf16(runs, tmp_path):
    call_script("launch/convert.py", runs / "two", "--out", tmp_path / "bf16", "--dtype", "bfloat16")
    (file,) = (tmp_path / "bf16").glob("*.safetensors")
    weights = load_file(file)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    full = load_model(locate(runs / "two")).state_dict()
    assert all(torch.equal(full[name].bfloat16(), tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("rule", ["softmax", "gated_delta"])
def test_an_export_has_sharper_features(rule, shards, tmp_path):
    pretrain(shards, tmp_path, "run", "steps=6", "validation.every=6", f"model.memory_rule={rule}")
    call_script("launch/convert.py", tmp_path / "run", "--out", tmp_path / "sharp", "--sharpen-memory", "1.5")
    trained = load_model(locate(tmp_path / "run"))
    sharp = InfiniGPTNeoForCausalLM.from_pretrained(tmp_path / "sharp")
    for name, weight in sharp.state_dict().items():
        more = math.log(1.5) if name.endswith("log_scale") else 0.0
        assert torch.equal(weight, trained.state_dict()[name] + more), name
    x = torch.randn(1, 1, trained.config.num_heads, 8, trained.config.head_dim)
    before, after = (model.transformer.h[0].attention for model in (trained, sharp))
    features = before.rule.features(1.5 * x, before.memory_parameters())
    torch.testing.assert_close(after.rule.features(x, after.memory_parameters()), features)
    assert "softmax features were multiplied by 1.5" in (tmp_path / "sharp" / "README.md").read_text()


def test_a_folder_of_other_files_is_not_overwritten(runs, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = call_script("launch/convert.py", runs / "one", "--out", tmp_path, code=2)
    assert "holds other files" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.fixture(scope="module")
def gpt_neo(shards, tmp_path_factory):
    """A GPT-Neo with random weights, saved by transformers."""
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 2}
    positions = {"max_position_embeddings": 64, "window_size": 16}
    config = GPTNeoConfig(vocab_size=512, **layers, **positions, bos_token_id=0, eos_token_id=0)
    folder = tmp_path_factory.mktemp("gpt-neo")
    GPTNeoForCausalLM(config).save_pretrained(folder)
    load_tokenizer(ModelLocation(shards / "tokenizer", None, None)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("gates", "beta"), [("closed", -4.0), ("zero", 0.0)])
def test_gpt_neo_becomes_infini_gpt_neo_and_is_trained(gates, beta, gpt_neo, shards, tmp_path):
    out = tmp_path / "infini"
    call_script("launch/convert.py", "--from-gpt-neo", gpt_neo, "--out", out, "--segment-length", 32, "--gates", gates)
    model = InfiniGPTNeoForCausalLM.from_pretrained(out).eval()
    assert all((layer.attention.beta == beta).all() for layer in model.transformer.h)
    ids = torch.randint(2, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    gpt_neo_model = GPTNeoForCausalLM.from_pretrained(gpt_neo).eval()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, gpt_neo_model(ids).logits, atol=1e-5)  # one segment
    pretrain(shards, tmp_path, "tuned", "steps=6", "validation.every=6", shape=[f"model.start_from={out}"])
    lines = read_metrics(tmp_path / "tuned")
    before, after = (line["validation/loss"] for line in lines if "validation/loss" in line)
    assert after < before
    assert lines[-2]["gate/layer_0/head_0"] != pytest.approx(1 / (1 + torch.tensor(-beta).exp().item()), abs=1e-4)


def test_mistakes_are_one_sentence(runs, exported, gpt_neo, tmp_path):
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    for arguments, words in (
        ([tmp_path / "none"], "no such folder"),
        ([empty], "no complete checkpoint"),
        ([tmp_path], "neither an exported folder"),
        ([exported], "is already in Hugging Face format"),
        ([gpt_neo], f"is a gpt_neo model: convert it first, with --from-gpt-neo {gpt_neo}"),
        (["--from-gpt-neo", tmp_path], "--from-gpt-neo"),
        (["--from-gpt-neo", exported], "is a 'infini_gpt_neo' model, not gpt_neo"),
        (["--from-gpt-neo", gpt_neo, "--segment-length", "99"], "segment_length=99 is more than"),
        ([runs / "one", "--from-gpt-neo", "x"], "either"),
        ([runs / "one", "--gates", "zero"], "--gates zero has an effect only with --from-gpt-neo"),
        ([runs / "one", "--short-conv", "2"], "--short-conv 2 has an effect only with --from-gpt-neo"),
        ([runs / "one", "--sharpen-memory", "1.5"], "the features of memory_rule=linear have no scale; only those of"),
        ([runs / "one", "--sharpen-memory", "0"], "--sharpen-memory 0.0: give a number above 0, such as 1.5"),
        (["--from-gpt-neo", gpt_neo, "--sharpen-memory", "2"], "2.0 has an effect only without --from-gpt-neo"),
        (["--from-gpt-neo", gpt_neo, "--segment-length", "32", "--short-conv", "1"], "short_conv=1 is no width"),
        (["--from-gpt-neo", gpt_neo, "--segment-length", "32", "--embed-conv", "1"], "embed_conv=1 is no width"),
    ):
        done = call_script("launch/convert.py", *arguments, "--out", tmp_path / "out", code=2)
        assert words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_failed_upload_keeps_the_folder(exported, tmp_path):
    out = tmp_path / "out"
    done = call_script("launch/convert.py", exported.parent, "--out", out, "--push-to-hub", "nobody/nothing", code=2)
    assert "--push-to-hub nobody/nothing" in done.stderr and "Traceback" not in done.stderr
    assert (out / "config.json").exists()


def test_generate_from_run_checkpoint_and_export(exported, tmp_path):
    """All three give the same text. The prompt is longer than a segment, from an argument, a file or standard input."""
    greedy = ["--temperature", "0", "--max-new-tokens", "12"]
    prompt = "def walk(self, node):\n    return " * 20
    texts = [
        call_script("launch/generate.py", folder, "--prompt", prompt, *greedy).stdout
        for folder in (exported, exported.parent, exported.parent / "checkpoints" / "step-000020")
    ]
    assert texts[0].startswith(prompt) and len(texts[0]) > len(prompt) + 5
    assert texts[0] == texts[1] == texts[2]
    (tmp_path / "prompt.txt").write_text(prompt)
    assert call_script("launch/generate.py", exported, "--file", tmp_path / "prompt.txt", *greedy).stdout == texts[0]
    assert run_script("launch/generate.py", exported, *greedy, stdin=prompt).stdout == texts[0]
    call_script("launch/generate.py", exported, "--prompt", prompt, "--memory-off", "--max-new-tokens", "3")


def test_mistakes_in_generate_are_one_sentence(exported, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for arguments, words in (
        (["--file", tmp_path / "binary"], "cannot be read as text"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0 must be a finite number of at least 0"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature nan must be a finite number of at least 0"),
        (["--prompt", "a", "--temperature", "inf"], "--temperature inf must be"),
        (["--prompt", "a", "--top-p", "nan"], "--top-p nan must be above 0 and at most 1"),
    ):
        done = call_script("launch/generate.py", exported, *arguments, code=2)
        assert words in done.stderr and "Traceback" not in done.stderr
    done = run_script("launch/generate.py", exported, stdin="", code=2)
    assert done.stderr.startswith("error: no prompt: standard input is empty")


def test_generate_ends_quietly_with_the_program_that_reads_its_text(exported):
    """`python launch/generate.py ... | head -n 1`, and standard input closed."""
    command = [sys.executable, "launch/generate.py", exported, "--max-new-tokens", "500", "--seed", "1"]
    shell = 'exec "$@" <&-'
    process = subprocess.Popen(
        ["bash", "-c", shell, "-", *map(str, command)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 141


def test_report(exported):
    run = exported.parent
    done = call_script("launch/report.py", run, "--rows", "4")
    text = (run / "report.md").read_text()
    for words in ("validation loss", "with the memory off", "tokens/s", "launch/generate.py", "tensorboard --logdir"):
        assert words in done.stdout and words in text, words
    for name in ("loss.png", "loss_by_position.png", "gates.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG") and name in text
