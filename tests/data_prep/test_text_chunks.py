"""Long texts are split where the tokens stay the same, for GPT-2's pattern and for tokenizers with normalizers."""

import json
import random

import pytest
from preparing import SMALL, TEXTS
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_prep.prepare import PrepareOptions, prepare
from data_prep.text_chunks import SPACE_PATTERNS, find_splitter, split_text

# What a cut could go wrong at: runs of white space, accents after a space, ligatures, contractions, scripts.
SEPARATORS = [
    " ",
    "  ",
    "\n",
    " \n\n ",
    "\t",
    "\r\n",
    "\u00a0",
    "\u2028",
    "\u3000",
    "\x1c",
    "",
    ". ",
    ", ",
    "。",
    "'s ",
    "-",
]
WORDS = [*"aé東京", "e\u0301", " \u0301", "\u00b4", "\ufb01t", "Straße", "ΣΑΣ", "''", "``", "_", "\u200b", "\U0001f40d"]
WORDS += ["İ", "123", "v2", "don't", "I'll", "'", "▁", "\u0600", "한국어", "เก่า", "мир", "<|x|>", "x" * 30]
NORMALIZERS = {
    "none": [],
    "bert": [normalizers.BertNormalizer()],
    "nfc": [normalizers.NFC()],
    "accents": [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()],
    "quotes": [normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.Nmt()],
    "t5": [normalizers.NFKC(), normalizers.Strip(False, True), normalizers.Replace(Regex(" {2,}"), "▁")],
    "runs": [normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")],
    "llama": [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")],
    "gemma": [normalizers.Replace(" ", "▁")],
}
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZERS = {
    "none": None,
    "bert": pre_tokenizers.BertPreTokenizer(),
    "whitespace": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True)]),
    "words": pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Whitespace()]),
    "always": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "first": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "never": pre_tokenizers.Metaspace(prepend_scheme="never"),
    "old_t5": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
    "gemma": pre_tokenizers.Split(" ", "merged_with_previous"),
    "spaces": pre_tokenizers.Split(" ", "merged_with_next"),
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    **{
        f"pattern{i}": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])
        for i, pattern in enumerate(sorted(SPACE_PATTERNS))
    },
    "tiktoken": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(max(SPACE_PATTERNS)), "removed", True), BYTES]),
}
NOT_SPLIT = {"none", "gemma"}  # the model then sees the text in one piece
MODELS = {
    "bpe": lambda: (models.BPE(unk_token="?", fuse_unk=True), trainers.BpeTrainer),
    "wordpiece": lambda: (models.WordPiece(unk_token="?"), trainers.WordPieceTrainer),
    "unigram": lambda: (models.Unigram(), trainers.UnigramTrainer),
}


def make_text(seed: int, size: int) -> str:
    drawn = random.Random(seed)
    words = WORDS * 3 + " ".join(TEXTS[:3]).split()
    return "".join(drawn.choice(words) + drawn.choice(SEPARATORS + [" "] * 20) for _ in range(size))


def make_tokenizer(normalizer: str, pre_tokenizer: str, model: str, text: str) -> Tokenizer:
    empty, trainer = MODELS[model]()
    tokenizer = Tokenizer(empty)
    # Trained without the normalizer's "▁" and on short texts, so that a BPE without pre-tokenizer is trained in time.
    tokenizer.normalizer = normalizers.Sequence(NORMALIZERS[normalizer])
    if PRE_TOKENIZERS[pre_tokenizer] is not None:
        tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
    settings = {"vocab_size": 700, "special_tokens": ["?", "<|x|>"], "show_progress": False}
    pieces = text.split(" ") if pre_tokenizer in NOT_SPLIT else [text[i : i + 200] for i in range(0, len(text), 200)]
    tokenizer.train_from_iterator(pieces, trainer(**settings | ({"unk_token": "?"} if model == "unigram" else {})))
    return tokenizer


def encode_in_chunks(tokenizer: Tokenizer, text: str) -> tuple[list[int], int]:
    splitter = find_splitter(tokenizer.to_str())
    assert splitter is not None
    later = Tokenizer.from_str(splitter.later_chunks)
    later.encode_special_tokens = True
    chunks = list(splitter.split(text))
    assert "".join(chunks) == text
    encoded = [(later if i else tokenizer).encode(chunk, add_special_tokens=False) for i, chunk in enumerate(chunks)]
    return [token for encoding in encoded for token in encoding.ids], len(chunks)


def is_split(normalizer: str, pre_tokenizer: str, model: str) -> bool:
    """Whether the combination divides a text at a space."""
    written = normalizer in ("t5", "llama", "gemma")  # a space, or a run of them, is a "▁" for the pre-tokenizer
    if pre_tokenizer in NOT_SPLIT:
        return model == "bpe" and normalizer in ("llama", "gemma")
    return not written or pre_tokenizer in ("always", "first", "never", "old_t5")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_chunks_give_the_same_tokens(normalizer, model, monkeypatch):
    monkeypatch.setattr("data_prep.text_chunks.CHUNK_CHARACTERS", 20)
    text = make_text(0, 3000)
    for pre_tokenizer in PRE_TOKENIZERS:
        spec = make_tokenizer(normalizer, pre_tokenizer, model, make_text(1, 2000)).to_str()
        tokenizer = Tokenizer.from_str(spec)  # a Unigram's numbers change a little as they are written
        tokenizer.encode_special_tokens = True
        assert (find_splitter(spec) is not None) == is_split(normalizer, pre_tokenizer, model), pre_tokenizer
        if find_splitter(spec) is not None:
            ids, number = encode_in_chunks(tokenizer, text)
            assert number > 200 and ids == tokenizer.encode(text, add_special_tokens=False).ids, pre_tokenizer


def test_gpt2s_pattern_is_split_in_text_without_spaces_too(prepared, monkeypatch):
    monkeypatch.setattr("data_prep.text_chunks.CHUNK_CHARACTERS", 50)
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer" / "tokenizer.json"))
    chinese = "".join(random.Random(0).choices("東京都の人口は多い。、！12", k=5000))
    base64 = "".join(random.Random(0).choices("ABCxyz0189+/", k=5000))
    for text in ("".join(TEXTS) + " \n\n x\u00a0 \x1c y\u2028 z  ", make_text(2, 2000), chinese, base64):
        ids, number = encode_in_chunks(tokenizer, text)
        assert number > 60 and ids == tokenizer.encode(text).ids


def test_a_tokenizer_that_looks_across_spaces_is_not_split(prepared):
    spec = (prepared / "tokenizer" / "tokenizer.json").read_text()

    def change(**parts):
        return json.dumps(json.loads(spec) | parts)

    bytes_at_once = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}
    own_pattern = {"type": "Split", "pattern": {"Regex": r"\w+ \w+"}, "behavior": "Isolated", "invert": False}
    two_words = AddedToken("New York", special=False)
    with_added_token = Tokenizer.from_str(spec)
    with_added_token.add_tokens([two_words])
    for other in (
        change(normalizer={"type": "Replace", "pattern": {"Regex": "a b"}, "content": "c"}),
        change(normalizer={"type": "Replace", "pattern": {"String": "_"}, "content": " "}),
        change(normalizer={"type": "ByteLevel"}),
        change(pre_tokenizer=bytes_at_once),
        change(pre_tokenizer={"type": "Sequence", "pretokenizers": [own_pattern, bytes_at_once]}),
        change(pre_tokenizer=None),
        with_added_token.to_str(),
    ):
        assert find_splitter(other) is None
    assert find_splitter(change(normalizer={"type": "NFC"})).boundary.pattern == "(?<=[!-~]) "


def test_llama2s_merges_decide_whether_it_is_split():
    """Its BPE sees the complete text; a merge of "a" with the "▁" after it would reach across a cut."""
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "a▁": 5}

    def tokenizer(merges):
        model = models.BPE({t: i for t, i in vocabulary.items() if t in "▁ab" or t in map("".join, merges)}, merges)
        made = Tokenizer(model)
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return made

    assert find_splitter(tokenizer([("a", "▁")]).to_str()) is None
    assert encode_in_chunks(tokenizer([("▁", "a")]), "a a b") == ([4, 4, 1, 3], 1)


@pytest.mark.parametrize(("size", "chunks"), [(100, 1), (1000, 1), (1024, 1), (1025, 2), (5000, 5)])
def test_text_without_boundaries_is_cut_for_training_alone(size, chunks, monkeypatch):
    monkeypatch.setattr("data_prep.text_chunks.CHUNK_CHARACTERS", 100)
    text = "x" * size
    assert list(split_text(text)) == [text]
    assert list(map(len, split_text(text, longest=1024)))[:-1] == [1024] * (chunks - 1)
    assert "".join(split_text(text, longest=1024)) == text


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_rows_of_a_loaded_tokenizer_with_a_normalizer(kind, tmp_path, monkeypatch):
    """The processes that tokenize give later chunks to a tokenizer without Prepend."""
    monkeypatch.setattr("data_prep.text_chunks.CHUNK_CHARACTERS", 500)
    tokenizer = make_tokenizer(kind, {"llama": "none", "bert": "bert"}[kind], "bpe", make_text(1, 2000))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|x|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    texts = tmp_path / "texts"
    texts.mkdir()
    documents = [f"{i} {text}" for i, text in enumerate(TEXTS[:12])]
    for i, text in enumerate(documents):
        (texts / f"{i:02}.txt").write_text(text)
    options = SMALL | {"validation_fraction": 0.5, "vocab_size": 8192, "tokenizer": str(tmp_path)}
    manifest = prepare(PrepareOptions(f"text:{texts}", tmp_path / "out", **options), quiet=True)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    lengths = [1 + len(tokenizer.encode(text, add_special_tokens=False).ids) for text in documents]
    assert manifest.train.tokens + manifest.validation.tokens == sum(lengths)
    assert sum(len(list(find_splitter(tokenizer.to_str()).split(text))) for text in documents) > 2 * len(documents)
