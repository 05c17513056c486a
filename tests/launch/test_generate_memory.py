"""launch/generate.py --remember and --memory: a book is read once, and continued as often as wanted."""

import pytest
import torch
from harness import call_script

from infini_ds.conversion.export import export
from infini_ds.conversion.locate import load_model, load_tokenizer, locate
from infini_ds.evaluation.generation import prompt_inputs, read_into_cache
from infini_ds.model import InfiniCache

GREEDY = ["--temperature", "0", "--max-new-tokens", "10"]
PROMPT = "    def walk(self):\n"


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(locate(runs / "one"), folder)
    return folder


@pytest.fixture(scope="module")
def book(corpus):
    return corpus / "argparse.txt"


@pytest.fixture(scope="module")
def remembered(folder, book, tmp_path_factory):
    """What was printed when the book was read, and the file of its memory."""
    memory = tmp_path_factory.mktemp("memory") / "book.memory"
    return call_script("launch/generate.py", folder, "--remember", book, "--memory", memory), memory


def test_a_prompt_continues_the_book_without_reading_it_again(folder, book, remembered):
    done, memory = remembered
    location = locate(folder)
    model, tokenizer = load_model(location), load_tokenizer(location)
    ids = prompt_inputs(tokenizer, model, book.read_text())["input_ids"]
    assert ids[0, 0] == model.config.bos_token_id and ids.shape[1] > 100 * model.config.segment_length
    assert done.stdout == "" and f"the memory of {ids.shape[1]:,} tokens of {book}" in done.stderr
    question = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    both = torch.cat([ids, question], dim=1)
    want = model.generate(both, attention_mask=torch.ones_like(both), max_new_tokens=10, do_sample=False)
    text = tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True)

    before = memory.read_bytes()
    options = ["--memory", memory, "--prompt", PROMPT, "--prompt", PROMPT]
    shown = call_script("launch/generate.py", folder, *options, *GREEDY).stdout
    assert shown == f"{text}\n{text}\n", "the second prompt continues the book, too, and not the first answer"
    assert memory.read_bytes() == before
    off = call_script("launch/generate.py", folder, *options[:4], "--memory-off", *GREEDY).stdout
    assert off.startswith(PROMPT)


def test_reading_and_asking_in_one_call(folder, book, remembered, tmp_path):
    options = ["--memory", tmp_path / "book.memory", "--prompt", PROMPT, *GREEDY]
    shown = call_script("launch/generate.py", folder, "--remember", book, *options).stdout
    assert shown == call_script("launch/generate.py", folder, "--memory", remembered[1], *options[2:]).stdout


def test_a_prompt_that_begins_like_the_remembered_text(folder, tmp_path):
    """Without the start token it is new text; with it, `generate()` would take it for the remembered text."""
    text, memory = "import os\nimport sys\n" * 20, tmp_path / "imports.memory"
    files = {name: tmp_path / name for name in ("text", "again", "started", "changed")}
    files["text"].write_text(text)
    files["again"].write_text(text + "    def")
    files["started"].write_text(f"<|endoftext|>{text}")
    files["changed"].write_text(f"<|endoftext|>{text[:-4]}math\n    def")
    call_script("launch/generate.py", folder, "--remember", files["text"], "--memory", memory)
    given = (folder, "--memory", memory, *GREEDY)
    shown = call_script("launch/generate.py", *given, "--file", files["again"]).stdout
    assert shown.startswith(text + "    def")
    for name, reason in (
        ("started", "tokens of the prompt already; give with --prompt or --file only what follows that text"),
        ("changed", "the prompt begins like the text in the cache, and then differs from it; give with --prompt or"),
    ):
        error = call_script("launch/generate.py", *given, "--file", files[name], code=2).stderr
        assert error.startswith(f"error: --memory {memory}: ") and reason in error and error.count("\n") == 1, error


def test_a_text_is_read_in_pieces_of_bounded_size(folder, monkeypatch):
    model = load_model(locate(folder))
    S = model.config.segment_length
    monkeypatch.setattr("infini_ds.evaluation.generation.PIECE_TOKENS", 4 * S + 3)
    ids = torch.randint(1, 500, (2, 7 * S + 5), generator=torch.Generator().manual_seed(0))
    pieces: list[int] = []
    cache = read_into_cache(model, ids, after_piece=pieces.append)
    assert pieces == [2 * S, 2 * S, 2 * S, S + 5], "four segments at once, of two rows"
    more = ids[:, :9]
    with torch.no_grad():
        of_cache = model(more, past_key_values=cache).logits
        assert torch.allclose(of_cache, model(torch.cat([ids, more], dim=1)).logits[:, -9:], atol=1e-4)


def test_mistakes_are_one_sentence(runs, folder, book, remembered, tmp_path):
    memory, new = remembered[1], tmp_path / "new"
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    location = locate(runs / "two")
    other = load_model(location)
    InfiniCache(other.config, 1, other.dtype, "cpu").save(tmp_path / "other", other)
    for arguments, sentence in (
        (["--remember", book], f"--remember {book} needs --memory FILE, the file to write what was read to"),
        (["--remember", book, "--memory", memory], f"--memory {memory} exists: leave --remember away to continue it"),
        (["--remember", book, "--memory", new, "--memory-off"], f"--memory-off: --remember {book} reads a text into"),
        (["--remember", tmp_path / "no.txt", "--memory", new], f"--remember {tmp_path}/no.txt cannot be read as text"),
        (["--remember", book, "--memory", new / "a"], f"--memory {new}/a: there is no folder {new}; name a file in"),
        (["--remember", book, "--memory", "/proc/a"], "--memory /proc/a cannot be written (No such file or directory)"),
        (["--seed", str(2**64), "--prompt", "a"], f"--seed {2**64} must be an integer of 64 bits"),
        (["--memory", new, "--prompt", "a"], f"--memory {new}: no such file; write it with --remember TEXT"),
        (["--memory", memory, "--prompt", ""], f"--memory {memory} needs text that continues it: give --prompt"),
        (["--memory", book, "--prompt", "a"], f"--memory {book} is damaged, or not a saved cache"),
        (["--memory", tmp_path / "other", "--prompt", "a"], "other is the cache of a model with other weights than"),
    ):
        error = call_script("launch/generate.py", folder, *arguments, code=2).stderr
        assert sentence in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not new.exists()
