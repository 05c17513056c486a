"""The tokenizer: trained on the training documents, or loaded; saved as an ordinary Hugging Face folder.

Heavy imports are inside the functions: the processes that tokenize need none of them.
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_prep.sources import first_line
from data_prep.text_chunks import cut
from infini_ds.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


@dataclass(frozen=True)
class TokenizerFacts:
    """What the rows and the manifest need to know. kind: "trained", "words" or "loaded". vocab_size: highest id and one
    more. start_id: first token of every document. sha256: of tokenizer.json."""

    kind: str
    vocab_size: int
    start_id: int
    pad_id: int
    sha256: str


def train_tokenizer(texts: Iterable[str], vocab_size: int, byte_limit: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE as GPT-2's, from the first `byte_limit` bytes of `texts`. Start, end, unknown: 0; padding: 1.

    Raises ValueError where the text is too little for `vocab_size`.
    """
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once is not worth an id
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in limit_bytes(texts, byte_limit) for piece in cut(text))
    run_interruptibly(tokenizer, pieces, trainer)
    learned = tokenizer.get_vocab_size()
    if learned < vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: the training text gives no more than {learned} tokens; "
            f"ask for {learned} or fewer, "
            "or give more text (--source, --tokenizer-bytes)"
        )
    return wrap(tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT, pad_token=PADDING)


def word_tokenizer(words: Iterable[str]) -> "PreTrainedTokenizerFast":
    """A token for each word, and the special tokens of `train_tokenizer`; white space divides a text into words."""
    vocabulary = {word: number for number, word in enumerate((END_OF_TEXT, PADDING, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT, pad_token=PADDING)


def run_interruptibly(tokenizer: Tokenizer, pieces: Iterable[str], trainer: trainers.BpeTrainer) -> None:
    """Trains in a thread: a signal such as Ctrl-C is seen by the main thread alone, where it is in Python."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(tokenizer.train_from_iterator, takewhile(lambda _: not stop.is_set(), pieces), trainer)
        try:
            training.result()
        finally:
            stop.set()


def byte_level(model: models.Model) -> Tokenizer:
    """A tokenizer with GPT-2's rules around `model`."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def limit_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first `limit` UTF-8 bytes of `texts`; the last text may be cut."""
    for text in texts:
        data = text.encode()[:limit]
        yield data.decode(errors="ignore")
        limit -= len(data)
        if limit <= 0:
            return


def wrap(tokenizer: Tokenizer, **special_tokens: str) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special_tokens)


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """The tokenizer of a folder or of the hub, as a PreTrainedTokenizerFast with its special tokens alone.

    Raises ValueError where it cannot be loaded, is not a fast one, or has neither a begin nor an end token.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "tokenizer_config.json").exists():
        return load_bare_folder(folder)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # from OSError to KeyError, by what is wrong and by version
        raise UserError(
            f"--tokenizer {name}: no tokenizer of that name in a folder here or on the hub ({first_line(error)}); "
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
            f"--tokenizer {name}: {no_boundary('its tokenizer_config.json names neither bos_token nor eos_token')}"
        )
    return wrap(backend, **special)


def load_bare_folder(folder: Path) -> "PreTrainedTokenizerFast":
    """A folder as GPT-2 was published: tokenizer.json, or vocab.json and merges.txt, no names of special tokens."""
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.exists():
            tokenizer = Tokenizer.from_file(str(whole))
        elif vocab.exists() and merges.exists():
            tokenizer = byte_level(models.BPE.from_file(str(vocab), str(merges)))
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
        raise UserError(f"--tokenizer {folder}: {no_boundary(reason)}")
    return wrap(tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)


def no_boundary(reason: str) -> str:
    return f"no token begins or ends a document ({reason}); add one, or pass --tokenizer train"


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path, kind: str) -> TokenizerFacts:
    """Saves to `folder` so that AutoTokenizer loads it on transformers 4 and 5, and tells what was saved."""
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name that 4 does not know; both know this one.
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    start = next(found for found in (tokenizer.bos_token_id, tokenizer.eos_token_id) if found is not None)
    pad = next(found for found in (tokenizer.pad_token_id, tokenizer.eos_token_id, start) if found is not None)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    sha256 = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    return TokenizerFacts(kind, vocab_size, start, pad, sha256)
