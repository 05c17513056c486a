"""Folders with missing, damaged, renamed or non-finite weights: what is loaded, or the sentence that names the file."""

import json
import shutil

import pytest
import torch
from harness import STEPS, call_script
from safetensors.torch import load_file, save_file
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

from data_prep.tokenizer import make_word_tokenizer
from infini_ds.config.model_config import model_config
from infini_ds.config.recipe import load_recipe
from infini_ds.conversion.gpt_neo import from_gpt_neo
from infini_ds.conversion.locate import ModelLocation, load_model, load_tokenizer, locate
from infini_ds.evaluation.model_loading import load_evaluated_model
from infini_ds.model import BlockSchedule, InfiniGPTNeoConfig, InfiniGPTNeoForCausalLM
from infini_ds.training.model_builder import build_model
from infini_ds.utils.errors import UserError
from infini_ds.utils.pretrained import load_pretrained

SHAPE = {"vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 16}
SHAPE |= {"max_position_embeddings": 32, "attention_types": [[["global", "local"], 1]]}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 0}
WORDS = [f"w{number}" for number in range(30)]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
LN = "transformer.h.1.ln_1"


def make_tokenizer() -> PreTrainedTokenizerFast:
    return make_word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def infini(tmp_path_factory):
    """An Infini-GPT-Neo and its tokenizer, in a safetensors file."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pretrained") / "infini"
    InfiniGPTNeoForCausalLM(InfiniGPTNeoConfig(**SHAPE, segment_length=8)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt_neo(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pretrained") / "gpt-neo"
    GPTNeoForCausalLM(GPTNeoConfig(**SHAPE)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def edit_weights(source, folder, edit):
    """Copy a folder, with `edit` applied to its dict of tensors."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    tensors = edit(load_file(file))
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def convert(folder, out):
    from_gpt_neo(str(folder), out, 8, "closed")


def start_from(folder, *overrides):
    recipe = load_recipe(
        None, [f"model.start_from={folder}", "data.path=none", "output=none", "name=x", *STEPS, *overrides]
    )
    return build_model(recipe, model_config(recipe, None), BlockSchedule())


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda t: {n: x for n, x in t.items() if LN not in n}, f"incomplete (missing: {LN}.bias, {LN}.weight)"),
        (lambda t: {n: x for n, x in t.items() if "wte" not in n}, "incomplete (missing: transformer.wte.weight)"),
        (lambda t: t | {f"{LN}.weight": torch.full((16,), torch.nan)}, f"hold NaN or infinity in {LN}.weight"),
        (lambda t: t | {f"{LN}.bias": torch.full((16,), torch.inf)}, f"hold NaN or infinity in {LN}.bias"),
        (lambda t: t | {f"{LN}.weight": torch.ones(17)}, f"{LN}.weight has another shape"),
        (lambda t: t | {"transformer.h.2.ln_1.weight": torch.ones(16)}, "hold transformer.h.2.ln_1.weight, which"),
        (lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}, "lm_head.weight differs from"),
    ],
)
def test_weights_that_are_not_the_model_are_refused_by_every_way_in(edit, sentence, infini, gpt_neo, tmp_path):
    ours, theirs = edit_weights(infini, tmp_path / "ours", edit), edit_weights(gpt_neo, tmp_path / "theirs", edit)
    for name, load in (
        (f"--from-gpt-neo {theirs}", lambda: convert(theirs, tmp_path / "out")),
        (f"model.start_from={ours}", lambda: start_from(ours)),
        (str(ours), lambda: load_model(locate(ours))),
        (str(ours), lambda: load_evaluated_model(str(ours), torch.device("cpu"))),
    ):
        with pytest.raises(UserError) as error:
            load()
        assert str(error.value).startswith(f"{name}: ") and sentence in str(error.value)
        assert "learning rate" not in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_scripts_show_one_sentence(infini, gpt_neo, tmp_path):
    lacking = edit_weights(gpt_neo, tmp_path / "lacking", lambda t: {n: x for n, x in t.items() if LN not in n})
    for script, *arguments in (
        ("launch/convert.py", "--from-gpt-neo", lacking, "--out", tmp_path / "out", "--segment-length", 8),
        ("launch/evaluate.py", lacking, "--tasks", "recall"),
    ):
        done = call_script(script, *arguments, code=2)
        assert f"incomplete (missing: {LN}.bias, {LN}.weight)" in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for script in ("launch/generate.py", "launch/evaluate.py"):
        done = call_script(script, tmp_path / "broken", *(["--prompt", "w1"] if "generate" in script else []), code=2)
        assert f"{tmp_path / 'broken' / 'config.json'} is damaged" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: {f"module.{n}": x for n, x in t.items()},
        lambda t: {f"module._orig_mod.{n}": x for n, x in t.items()},
        lambda t: {n.removeprefix("transformer."): x for n, x in t.items()},
        lambda t: {f"module.{n.removeprefix('transformer.')}": x for n, x in t.items()},
        lambda t: {n.replace("transformer.wte", "lm_head"): x for n, x in t.items()},
        lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()},
        lambda t: t | {"score.weight": torch.ones(2, 16)},
    ],
)
@pytest.mark.parametrize("source", ["infini", "gpt_neo"])
def test_other_names_of_the_same_weights_are_understood(edit, source, request, tmp_path):
    source = request.getfixturevalue(source)
    edited = edit_weights(source, tmp_path / "edited", edit)
    if source.name == "gpt-neo":
        convert(edited, tmp_path / "out")
        convert(source, tmp_path / "expected")
        model, expected = load_model(locate(tmp_path / "out")), load_model(locate(tmp_path / "expected"))
    else:
        model, expected = load_model(locate(edited)), load_model(locate(source))
    weights = model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(not weight.is_meta for weight in model.parameters())


def test_pickled_weights_are_checked_and_read(infini, tmp_path):
    shutil.copytree(infini, tmp_path / "bin")
    tensors = load_file(tmp_path / "bin" / "model.safetensors")
    (tmp_path / "bin" / "model.safetensors").unlink()
    file = tmp_path / "bin" / "pytorch_model.bin"
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, file)
    weights = load_model(locate(tmp_path / "bin")).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(UserError, match=f"{file} is truncated or damaged"):
        load_model(locate(tmp_path / "bin"))


def sharded(folder) -> None:
    load_pretrained(InfiniGPTNeoForCausalLM, folder, "x").save_pretrained(folder, max_shard_size="8KB")
    (folder / "model.safetensors").unlink()


def damage_shard(folder) -> str:
    """Remove a tensor from a shard, which the index still lists."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index[f"{LN}.weight"]
    tensors = load_file(file)
    del tensors[f"{LN}.weight"]
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{file} lacks {LN}.weight, which model.safetensors.index.json lists"


def remove_shard(folder) -> str:
    file = sorted(folder.glob("model-*.safetensors"))[1]
    file.unlink()
    return f"{file.name} of {folder / 'model.safetensors.index.json'} is missing"


def write_file(name: str, content, sentence: str):
    def edit(folder) -> str:
        content_before = (folder / name).read_bytes()
        (folder / name).unlink()
        new = content(content_before) if callable(content) else content
        if new is not None:
            (folder / name).write_bytes(new)
        return sentence.format(file=folder / name, folder=folder)

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        write_file("model.safetensors", lambda b: b[:-100], "{file} is truncated or damaged"),
        write_file("model.safetensors", b"", "{file} is truncated or damaged"),
        write_file("model.safetensors", LFS.encode(), "{file} is a git-LFS pointer, not the file itself"),
        write_file("model.safetensors", None, "holds no weights: {folder} has neither model.safetensors nor"),
        write_file("config.json", lambda b: b[:50], "{file} is damaged"),
        write_file("config.json", b"[]", "{file} is damaged"),
        lambda folder: (sharded(folder), damage_shard(folder))[1],
        lambda folder: (sharded(folder), remove_shard(folder))[1],
        lambda folder: (
            sharded(folder),
            write_file("model.safetensors.index.json", b"{", "{file} is damaged")(folder),
        )[1],
    ],
)
def test_damaged_files_are_named(damage, infini, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(infini, folder)
    sentence = damage(folder)
    for load in (
        lambda: load_model(locate(folder)),
        lambda: load_evaluated_model(str(folder), torch.device("cpu")),
        lambda: start_from(folder),
    ):
        with pytest.raises(UserError) as error:
            load()
        assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        write_file("tokenizer.json", None, "tokenizer.json"),
        write_file("tokenizer.json", lambda b: b[:99], "{file} is damaged"),
        write_file("tokenizer.json", LFS.encode(), "{file} is a git-LFS pointer"),
        write_file("tokenizer_config.json", None, "holds no tokenizer_config.json"),
    ],
)
def test_damaged_tokenizers_are_named(damage, infini, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(infini, folder)
    sentence = damage(folder)
    with pytest.raises(UserError) as error:
        load_tokenizer(ModelLocation(folder, None, None))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_an_external_model_with_incomplete_weights_is_refused(gpt_neo, tmp_path):
    folder = edit_weights(gpt_neo, tmp_path / "external", lambda t: {n: x for n, x in t.items() if LN not in n})
    with pytest.raises(UserError, match=rf"{folder}: the weights are incomplete \(missing: {LN}.bias, {LN}.weight\)"):
        load_evaluated_model(str(folder), torch.device("cpu"))


def test_another_memory_rule_may_start_from_weights_without_its_parameters(infini):
    assert start_from(infini, "model.memory_rule=delta").config.memory_rule == "delta"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_short_convolution_that_a_recipe_adds_starts_as_the_identity(prefix, infini, tmp_path):
    """The model stays what its weights make it, whichever way they are read."""
    folder = edit_weights(infini, tmp_path / "start", lambda tensors: {prefix + n: x for n, x in tensors.items()})
    before, after = start_from(folder).eval(), start_from(folder, "model.short_conv=3").eval()
    conv = after.transformer.h[1].attention.short_conv
    assert torch.equal(conv.k, torch.eye(3)[0][:, None].expand(3, 16)) and torch.equal(conv.v, conv.k)
    ids = torch.randint(2, 32, (2, 29), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(after(ids).logits, before(ids).logits)


def test_a_convolution_of_embeddings_that_a_recipe_adds_starts_as_the_identity(infini):
    before, after = start_from(infini).eval(), start_from(infini, "model.embed_conv=4").eval()
    assert torch.equal(after.transformer.embed_conv.weight, torch.eye(4)[0][:, None].expand(4, 16))
    ids = torch.randint(2, 32, (2, 29), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(after(ids).logits, before(ids).logits)


def test_weights_without_their_short_convolution_are_incomplete(tmp_path):
    config = InfiniGPTNeoConfig(**SHAPE, segment_length=8, short_conv=2)
    InfiniGPTNeoForCausalLM(config).save_pretrained(tmp_path / "complete")
    name = "transformer.h.1.attn.attention.short_conv.k"
    folder = edit_weights(
        tmp_path / "complete", tmp_path / "part", lambda tensors: tensors.pop(name) is None or tensors
    )
    for overrides in ((), ("model.short_conv=2",)):
        with pytest.raises(UserError, match=rf"the weights are incomplete \(missing: {name}\)"):
            start_from(folder, *overrides)


def test_gpt_neo_is_converted_with_convolutions_that_change_nothing(gpt_neo, tmp_path):
    for name, width in (("with", 2), ("without", 0)):
        from_gpt_neo(str(gpt_neo), tmp_path / name, 8, "closed", short_conv=width, embed_conv=2 * width)
    models = [load_model(locate(tmp_path / name)) for name in ("with", "without")]
    assert [(model.config.short_conv, model.config.embed_conv) for model in models] == [(2, 4), (0, 0)]
    ids = torch.randint(2, 32, (2, 29), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))
        theirs = GPTNeoForCausalLM.from_pretrained(gpt_neo).eval()(ids[:, :8]).logits
        assert torch.allclose(models[0](ids[:, :8]).logits, theirs, atol=1e-5)
    trained = start_from(tmp_path / "with")
    assert (trained.config.short_conv, trained.config.embed_conv) == (2, 4)
