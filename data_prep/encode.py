"""Documents to token ids in several processes, in order, with a bounded number of documents in memory."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from data_prep.documents import Document
from data_prep.splits import Split
from data_prep.text_chunks import Splitter, find_splitter
from infini_ds.utils.errors import UserError

logger = logging.getLogger(__name__)
BATCH_CHARACTERS = 1 << 19  # that are sent to a process at once, at least
LARGE_CHUNK = 1 << 24  # characters
BYTES_PER_CHARACTER = 120  # of memory that `tokenizers` needs
PIECE_OVERHEAD = 100  # characters that a piece counts for besides its own, so that a batch has not a million of them

# Of a tokenizing process, set once as it starts.
_tokenizer: Tokenizer
_later_tokenizer: Tokenizer | None  # of all chunks of a document but the first, if it is another one
_start: np.ndarray


class Piece(NamedTuple):
    """A document, or a chunk of a long one.

    Attributes:
        starts: it is the first chunk of its document.
        answers: as in `Document`. A document with answers is not split.
    """

    split: Split
    starts: bool
    text: str
    answers: list[tuple[int, int]] | None


class EncodedPiece(NamedTuple):
    """The tokens of a piece.

    Attributes:
        ids: token ids, with the start token first if the piece starts a document.
        bytes: of its text in UTF-8.
        loss_mask: bool, the tokens that belong to an answer; None for all of them.
    """

    split: Split
    starts: bool
    ids: np.ndarray
    bytes: int
    loss_mask: np.ndarray | None


# Of a piece: its ids, bytes and loss mask.
Tokens = tuple[np.ndarray, int, np.ndarray | None]


def encode_documents(
    documents: Iterable[tuple[Split, Document]], tokenizer_json: Path, start_id: int, workers: int
) -> Generator[EncodedPiece, None, None]:
    """Yield the tokens of all documents, in their order whatever `workers` is.

    Raises:
        UserError: a process was killed from outside, as happens if a machine is short of memory.
    """
    splitter = find_splitter(tokenizer_json.read_text())
    batches = _batches(_pieces(documents, splitter))
    waiting: deque[tuple[list[Piece], Future[list[Tokens]]]] = deque()
    with _tokenizing_processes(tokenizer_json, splitter, start_id, workers) as pool:
        try:
            for batch in batches:
                waiting.append((batch, _submit(pool, batch)))
                if len(waiting) > 2 * workers:
                    yield from _collect(*waiting.popleft())
            while waiting:
                yield from _collect(*waiting.popleft())
        except BrokenProcessPool as error:
            raise UserError(
                f"--workers {workers}: a tokenizing process was killed, most often because memory was full; "
                "pass a smaller number"
            ) from error


def _pieces(documents: Iterable[tuple[Split, Document]], splitter: Splitter | None) -> Iterator[Piece]:
    for split, document in documents:
        assert document.text is not None, "documents without text are left out before"
        chunks = [document.text] if splitter is None or document.answers is not None else splitter.split(document.text)
        for index, chunk in enumerate(chunks):
            if len(chunk) > LARGE_CHUNK:
                logger.warning(
                    f"{document.name} has {len(chunk):,} characters that this tokenizer takes at once, for which a "
                    f"process needs about {len(chunk) * BYTES_PER_CHARACTER / 2**30:.0f} GiB of memory"
                )
            yield Piece(split, index == 0, chunk, document.answers)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + PIECE_OVERHEAD
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _collect(batch: list[Piece], future: Future[list[Tokens]]) -> Iterator[EncodedPiece]:
    for piece, (ids, size, loss_mask) in zip(batch, future.result(), strict=True):
        yield EncodedPiece(piece.split, piece.starts, ids, size, loss_mask)


@contextmanager
def _tokenizing_processes(
    tokenizer_json: Path, splitter: Splitter | None, start_id: int, workers: int
) -> Iterator[ProcessPoolExecutor]:
    # spawn, since `tokenizers` has threads by now, and a forked copy of a locked lock is never released. An executor,
    # and not a multiprocessing.Pool, which waits forever if one of its processes is killed.
    context = multiprocessing.get_context("spawn")
    first = tokenizer_json.read_text()
    later = first if splitter is None else splitter.later_chunks
    pool = ProcessPoolExecutor(workers, context, _start_process, (first, None if later == first else later, start_id))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, batch: list[Piece]) -> Future[list[Tokens]]:
    """Send a batch to a process, starting one if another is of use.

    Ctrl-C reaches the whole process group. A new process inherits that it is blocked, and is ended by this one.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode_batch, [(piece.starts, piece.text, piece.answers) for piece in batch])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_process(tokenizer_json: str, later_chunks: str | None, start_id: int) -> None:
    """Prepare a tokenizing process.

    Args:
        later_chunks: as in `Splitter`, if they have a tokenizer of their own.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process; `tokenizers` reads this at every call
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    global _tokenizer, _later_tokenizer, _start
    _tokenizer = _plain_tokenizer(tokenizer_json)
    _later_tokenizer = None if later_chunks is None else _plain_tokenizer(later_chunks)
    _start = np.array([start_id], np.uint32)


def _plain_tokenizer(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> does not end there
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _exit_with_parent() -> None:
    """Exit when the parent does: a killed parent closes no queue, and its processes would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_batch(batch: list[tuple[bool, str, list[tuple[int, int]] | None]]) -> list[Tokens]:
    """Tokenize (starts, text, answers) of pieces, in a tokenizing process."""

    def encode(tokenizer: Tokenizer, texts: list[str]) -> list[Encoding]:
        # The fast form keeps no offsets.
        keep_offsets = any(answers for *_, answers in batch)
        return (tokenizer.encode_batch if keep_offsets else tokenizer.encode_batch_fast)(
            texts, add_special_tokens=False
        )

    if _later_tokenizer is None:
        encodings = iter(encode(_tokenizer, [text for _, text, _ in batch]))
        following = encodings
    else:
        encodings = iter(encode(_tokenizer, [text for starts, text, _ in batch if starts]))
        following = iter(encode(_later_tokenizer, [text for starts, text, _ in batch if not starts]))
    results = []
    for starts, text, answers in batch:
        encoding = next(encodings if starts else following)
        ids = np.array(encoding.ids, np.uint32)
        loss_mask = None if answers is None else answer_mask(encoding.offsets, answers)
        if starts:
            ids = np.concatenate((_start, ids))
            loss_mask = None if loss_mask is None else np.concatenate(([False], loss_mask))
        results.append((ids, len(text.encode()), loss_mask))
    return results


def answer_mask(offsets: list[tuple[int, int]], answers: list[tuple[int, int]]) -> np.ndarray:
    """Return which tokens share a character with an answer, both given by their place in the text."""
    begin, end = np.array(offsets, np.int64).reshape(-1, 2).T[..., None]
    first, last = np.array(answers, np.int64).reshape(-1, 2).T
    return ((begin < last) & (first < end)).any(1)
