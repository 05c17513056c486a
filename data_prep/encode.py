"""Documents to token ids in several processes, in order, with a bounded number of documents in flight."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data_prep.sources import Document
from data_prep.splits import Split
from data_prep.text_chunks import cut, may_cut
from infini_ds.utils.errors import UserError

BATCH = 1 << 19  # characters that go to a process at once, at least

# Of a tokenizing process, set once as it starts.
_tokenizer: Tokenizer
_start: np.ndarray


class Piece(NamedTuple):
    """A document or a part of one, `starts` where it is the first part. answers: as in `Document`, of the whole one;
    a document that has some is not cut."""

    split: Split
    starts: bool
    text: str
    answers: list[tuple[int, int]] | None


class Encoded(NamedTuple):
    """Token ids of a piece, the start token ahead of them where a document starts. bytes: of UTF-8 text. learned: bool,
    those that belong to an answer; None for all."""

    split: Split
    starts: bool
    ids: np.ndarray
    bytes: int
    learned: np.ndarray | None


def encode_documents(
    documents: Iterable[tuple[Split, Document]], tokenizer_json: Path, start_id: int, workers: int
) -> Iterator[Encoded]:
    """Encodes (split, document) pairs; results come in the order of the documents whatever `workers` is.

    Raises ValueError where a process is killed from outside, as a machine short of memory does.
    """
    batches = batched(pieces(documents, may_cut(tokenizer_json.read_text())))
    waiting: deque = deque()
    with tokenizing_processes(tokenizer_json, start_id, workers) as pool:
        try:
            for batch in batches:
                waiting.append((batch, submit(pool, batch)))
                if len(waiting) > 2 * workers:
                    yield from collect(*waiting.popleft())
            while waiting:
                yield from collect(*waiting.popleft())
        except BrokenProcessPool as error:
            raise UserError(
                f"--workers {workers}: a tokenizing process was killed, most often for want of memory; "
                "pass a smaller number"
            ) from error


def pieces(documents: Iterable[tuple[Split, Document]], cutting: bool) -> Iterator[Piece]:
    for split, document in documents:
        whole = not cutting or document.answers is not None
        for index, part in enumerate([document.text] if whole else cut(document.text)):
            yield Piece(split, index == 0, part, document.answers)


def batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 100  # so that very short documents do not make a batch of a million
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def collect(batch: list[Piece], future: Future) -> Iterator[Encoded]:
    for piece, (ids, size, learned) in zip(batch, future.result(), strict=True):
        yield Encoded(piece.split, piece.starts, ids, size, learned)


@contextmanager
def tokenizing_processes(tokenizer_json: Path, start_id: int, workers: int) -> Iterator[ProcessPoolExecutor]:
    # spawn: `tokenizers` has threads by now, and a forked copy of a locked lock never opens. An executor and not a
    # multiprocessing.Pool, which waits for ever when one of its processes is killed.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, start_process, (str(tokenizer_json), start_id))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def submit(pool: ProcessPoolExecutor, batch: list[Piece]) -> Future:
    """Starts a process if one more is of use. Ctrl-C goes to the whole process group: a new process inherits the
    block, and leaves the ending to this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(encode_batch, [(piece.starts, piece.text, piece.answers) for piece in batch])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_process(tokenizer_json: str, start_id: int) -> None:
    """Readies a tokenizing process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process; `tokenizers` reads this at every call
    threading.Thread(target=end_with_parent, daemon=True).start()
    global _tokenizer, _start
    _tokenizer = Tokenizer.from_file(tokenizer_json)
    _tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> does not end there
    _tokenizer.no_truncation()
    _tokenizer.no_padding()
    _start = np.array([start_id], np.uint32)


def end_with_parent() -> None:
    """A killed parent closes no queue, and its processes would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_batch(
    batch: list[tuple[bool, str, list[tuple[int, int]] | None]],
) -> list[tuple[np.ndarray, int, np.ndarray | None]]:
    """Runs in a tokenizing process: (starts, text, answers) to (ids, bytes of text, learned)."""
    # The fast form keeps no offsets.
    encode = _tokenizer.encode_batch if any(answers for *_, answers in batch) else _tokenizer.encode_batch_fast
    encodings = encode([text for _, text, _ in batch], add_special_tokens=False)
    results = []
    for (starts, text, answers), encoding in zip(batch, encodings, strict=True):
        ids = np.array(encoding.ids, np.uint32)
        learned = None if answers is None else within_answers(encoding.offsets, answers)
        if starts:
            ids = np.concatenate((_start, ids))
            learned = None if learned is None else np.concatenate(([False], learned))
        results.append((ids, len(text.encode()), learned))
    return results


def within_answers(offsets: list[tuple[int, int]], answers: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens have a character of an answer, by their place in the text."""
    begin, end = np.array(offsets, np.int64).reshape(-1, 2).T[..., None]
    first, last = np.array(answers, np.int64).reshape(-1, 2).T
    return ((begin < last) & (first < end)).any(1)
