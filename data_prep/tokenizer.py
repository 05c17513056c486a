"""The tokenizer: trained on the training documents, or loaded; saved as an ordinary Hugging Face folder.

transformers is imported inside the functions, since it takes seconds and the processes that tokenize do not need it.
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_prep.text_chunks import split_text
from infini_ds.utils.errors import UserError, first_line
from infini_ds.utils.hashing import sha256_of_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
LONGEST_TRAINING_WORD = 256  # bytes
LONGEST_TRAINING_CHUNK = 1 << 20  # characters of a text without a place where it may be split


@dataclass(frozen=True)
class TokenizerInfo:
    """What rows and the manifest need to know of a tokenizer.

    Attributes:
        kind: "trained", "words" or "loaded".
        vocab_size: the highest id plus one.
        start_id: the first token of every document.
        sha256: of tokenizer.json.
    """

    kind: str
    vocab_size: int
    start_id: int
    pad_id: int
    sha256: str


def train_tokenizer(texts: Iterable[str], vocab_size: int, byte_limit: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE like GPT-2's on the first `byte_limit` bytes of `texts`.

    Its start, end and unknown token has id 0, its padding id 1.

    Raises:
        UserError: the text is too little for `vocab_size`.
    """
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once is not worth an id
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Each merge walks through the words that have it, so training on words of a million bytes would not end. Words are
    # cut in training alone: the tokenizer that is saved has GPT-2's pattern, unchanged.
    complete = tokenizer.pre_tokenizer
    cut_words = pre_tokenizers.Split(Regex(f"[\\s\\S]{{{LONGEST_TRAINING_WORD}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([complete, cut_words])
    chunks = (chunk for text in _limit_bytes(texts, byte_limit) for chunk in split_text(text, LONGEST_TRAINING_CHUNK))
    _train_interruptibly(tokenizer, chunks, trainer)
    tokenizer.pre_tokenizer = complete
    trained = tokenizer.get_vocab_size()
    if trained < vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: the training text gives no more than {trained} tokens; "
            f"ask for {trained} or fewer, or give more text (--source, --tokenizer-bytes)"
        )
    return _wrap(tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT, pad_token=PADDING)


def make_word_tokenizer(words: Iterable[str]) -> "PreTrainedTokenizerFast":
    """Return a tokenizer with a token for each word, words being divided by white space.

    Its special tokens are those of `train_tokenizer`.
    """
    vocabulary = {word: number for number, word in enumerate((END_OF_TEXT, PADDING, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT, pad_token=PADDING)


def _train_interruptibly(tokenizer: Tokenizer, chunks: Iterable[str], trainer: trainers.BpeTrainer) -> None:
    """Train in a thread, since Python handles signals such as Ctrl-C in the main thread alone, between its own code."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(tokenizer.train_from_iterator, takewhile(lambda _: not stop.is_set(), chunks), trainer)
        try:
            training.result()
        finally:
            stop.set()


def _byte_level(model: models.Model) -> Tokenizer:
    """Return a tokenizer of `model` with GPT-2's rules."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _limit_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield the first `limit` UTF-8 bytes of `texts`; the last text may be truncated."""
    for text in texts:
        data = text.encode()[:limit]
        yield data.decode(errors="ignore")
        limit -= len(data)
        if limit <= 0:
            return


def _wrap(tokenizer: Tokenizer, **special_tokens: str) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special_tokens)


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a folder or of the hub, as a PreTrainedTokenizerFast with its special tokens alone.

    Raises:
        UserError: it cannot be loaded, is not a fast one, or has neither a begin nor an end token.
    """
    name = os.path.expanduser(name)
    folder = Path(name)
    if folder.is_dir() and not (folder / "tokenizer_config.json").exists():
        return _load_bare_folder(folder)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # from OSError to KeyError, by what is wrong and by version
        raise UserError(
            f"--tokenizer {name}: no tokenizer of that name in a folder or on the hub ({first_line(error)}); "
            "name a folder that holds tokenizer.json, or pass --tokenizer train"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"--tokenizer {name}: it is a slow tokenizer without tokenizer.json; convert it to a fast one first"
        )
    roles = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
    special = {role: str(getattr(loaded, role)) for role in roles if getattr(loaded, role, None) is not None}
    if not special.keys() & {"bos_token", "eos_token"}:
        raise UserError(
            f"--tokenizer {name}: {_no_boundary('its tokenizer_config.json names neither bos_token nor eos_token')}"
        )
    return _wrap(backend, **special)


def _load_bare_folder(folder: Path) -> "PreTrainedTokenizerFast":
    """Load a folder as GPT-2 was published: tokenizer.json, or vocab.json and merges.txt, without special tokens."""
    complete, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if complete.exists():
            tokenizer = Tokenizer.from_file(str(complete))
        elif vocab.exists() and merges.exists():
            tokenizer = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
        else:
            raise UserError(f"--tokenizer {folder}: it holds neither tokenizer.json nor vocab.json and merges.txt")
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises plain Exception
        raise UserError(
            f"--tokenizer {folder}: its files cannot be read ({first_line(error)}); fetch them again"
        ) from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        reason = f"without tokenizer_config.json it needs {END_OF_TEXT} in its vocabulary"
        raise UserError(f"--tokenizer {folder}: {_no_boundary(reason)}")
    return _wrap(tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)


def _no_boundary(reason: str) -> str:
    return f"no token begins or ends a document ({reason}); add one, or pass --tokenizer train"


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path, kind: str) -> TokenizerInfo:
    """Save a tokenizer to `folder`, so that AutoTokenizer loads it on transformers 4 and 5."""
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name that 4 does not know; both know this one.
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    start = next(found for found in (tokenizer.bos_token_id, tokenizer.eos_token_id) if found is not None)
    pad = next(found for found in (tokenizer.pad_token_id, tokenizer.eos_token_id, start) if found is not None)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    return TokenizerInfo(kind, vocab_size, start, pad, sha256_of_file(folder / "tokenizer.json"))
