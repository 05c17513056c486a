"""Text to tokenizer and shards: all of `python -m data_prep`, as a function.

    from data_prep.prepare import PrepareOptions, prepare
    manifest = prepare(PrepareOptions(source="stdlib", out="corpus", vocab_size=4096))

The folder holds tokenizer/, train/, validation/ and manifest.json.
"""

import errno
import logging
import math
import os
import time
from contextlib import closing
from itertools import chain, islice
from pathlib import Path

from data_prep.atomic_dir import LOCK, build_folder
from data_prep.encode import encode_documents
from data_prep.manifest import FORMAT_VERSION, NAME, Manifest, load_manifest, package_versions, save_manifest
from data_prep.options import PrepareOptions, cache_key_options, check_options
from data_prep.packing import token_dtype
from data_prep.shards import split_writer
from data_prep.splits import DrawnShares, SkipCounts, split_documents, training_texts, validation_hashes
from data_prep.tokenizer import (
    TokenizerInfo,
    load_tokenizer,
    make_word_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from infini_ds.utils.errors import UserError
from infini_ds.utils.progress import ProgressBar

__all__ = ["Manifest", "PrepareOptions", "load_manifest", "prepare", "summary"]

logger = logging.getLogger(__name__)
ENTRIES = {"tokenizer", "train", "validation", NAME, LOCK}


def prepare(options: PrepareOptions, quiet: bool = False) -> Manifest:
    """Write `options.out`, unless it is finished with the same options, and return its manifest.

    Logs progress and prints a summary on stdout, unless `quiet`. Starts processes, so a script that calls this needs
    `if __name__ == "__main__":`.

    Raises:
        UserError: the user can repair it. `out` is then as it was.
    """
    check_options(options)
    out = Path(options.out).expanduser().resolve()  # a link is kept, and what it points to is written
    replace = False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        finished = _find_finished(out, options)
        if finished is not None:
            if not quiet:
                print(f"{out} is finished and was made with the same options: nothing to do")
            return finished
        replace = True
    try:
        with (
            ProgressBar("preparing", unit="tokens", shown=not quiet) as progress,
            build_folder(out, replace) as partial,
        ):
            manifest = _build(options, partial, progress)
    except Exception as error:
        raise _as_user_error(error, out) from error
    if not quiet:
        print(summary(manifest, out))
    return manifest


def _find_finished(out: Path, options: PrepareOptions) -> Manifest | None:
    """Return the manifest of a folder that is up to date, or None if --force lets it be replaced.

    Raises:
        UserError: the folder was made with other options, is not finished, or holds files of the user.
    """
    if not (out / NAME).is_file():
        raise UserError(
            f"--out {out}: it exists and was not finished by data_prep; name another folder, or remove it yourself"
        )
    if not options.force:
        manifest = load_manifest(out)
        if differing := _differences(manifest, options):
            raise UserError(
                f"--out {out}: it was made with other options ({differing}); pass --force to replace it, or another "
                "--out"
            )
        return manifest
    foreign = sorted(path.name for path in out.iterdir() if path.name not in ENTRIES)
    if foreign:
        raise UserError(
            f"--force: {out} also holds {', '.join(foreign)}, which data_prep did not write; move that away first"
        )
    return None


def _differences(manifest: Manifest, options: PrepareOptions) -> str:
    """Return the options that differ, as text; empty if none does."""
    return ", ".join(
        f"--{name.replace('_', '-')} {_given(manifest.options.get(name))} there, {_given(value)} here"
        for name, value in cache_key_options(options).items()
        if manifest.options.get(name) != value
    )


def _given(value: object) -> str:
    return "not given" if value is None else str(value)


def _build(options: PrepareOptions, folder: Path, progress: ProgressBar) -> Manifest:
    """Fill an empty folder, and write its manifest last."""
    started = time.monotonic()
    if options.separate_validation:
        progress.phase("reading validation documents")
    held_out = validation_hashes(options)
    tokenizer = _make_tokenizer(options, held_out, folder / "tokenizer", progress)

    skipped = SkipCounts()
    shape = (options.sequence_length, tokenizer.vocab_size, tokenizer.pad_id, options.shard_bytes)
    with (
        split_writer(folder / "train", *shape, options.has_loss_mask) as train,
        split_writer(folder / "validation", *shape, options.has_loss_mask) as validation,
    ):
        writers = {"train": train, "validation": validation}
        shares = DrawnShares()
        documents = split_documents(options, held_out, skipped, shares)
        tokenizer_json = folder / "tokenizer" / "tokenizer.json"
        workers = options.workers or os.cpu_count() or 1
        progress.phase("tokenizing")
        number = 0
        with closing(encode_documents(documents, tokenizer_json, tokenizer.start_id, workers)) as encoded:
            for piece in encoded:
                writers[piece.split].add(piece)
                number += piece.starts
                progress.advance({"documents": f"{number:,}"}, by=len(piece.ids))
        _check_splits_filled(options, train.counts.documents, validation.counts.documents, skipped, shares)
    if shares.divided:
        logger.info(
            f"the source is one document, so its last {options.validation_fraction:.2g} is the validation document; "
            "--document-separator divides a file into several documents"
        )

    manifest = Manifest(
        format_version=FORMAT_VERSION,
        options=cache_key_options(options),
        sequence_length=options.sequence_length,
        token_dtype=token_dtype(tokenizer.vocab_size),
        tokenizer=tokenizer,
        train=train.counts,
        validation=validation.counts,
        skipped=skipped,
        versions=package_versions(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=round(time.monotonic() - started, 1),
    )
    save_manifest(manifest, folder)
    return manifest


def _make_tokenizer(
    options: PrepareOptions, held_out: frozenset[int] | None, folder: Path, progress: ProgressBar
) -> TokenizerInfo:
    """Load or train the tokenizer, and save it to `folder`."""
    if not options.trains_tokenizer:
        progress.phase("loading the tokenizer")
        return save_tokenizer(load_tokenizer(options.tokenizer), folder, "loaded")
    vocabulary = options.vocabulary
    if vocabulary is not None:
        return save_tokenizer(make_word_tokenizer(vocabulary), folder, "words")
    progress.phase("training the tokenizer")
    texts = training_texts(options, held_out)
    first = list(islice(texts, 1))
    if not first:
        _check_text_to_train_on(options, held_out)
    return save_tokenizer(
        train_tokenizer(chain(first, texts), options.vocab_size, options.tokenizer_bytes), folder, "trained"
    )


def _check_text_to_train_on(options: PrepareOptions, held_out: frozenset[int] | None) -> None:
    """Raise a UserError if no document is left to train a tokenizer on."""
    skipped, shares, number = SkipCounts(), DrawnShares(), {"train": 0, "validation": 0}
    for split, _ in split_documents(options, held_out, skipped, shares):
        number[split] += 1
    if not number["train"]:
        _check_splits_filled(options, 0, number["validation"], skipped, shares)


def _check_splits_filled(
    options: PrepareOptions, train: int, validation: int, skipped: SkipCounts, shares: DrawnShares
) -> None:
    """Raise a UserError if a split has no document."""
    left_out = f"{skipped.empty} empty, {skipped.undecodable} undecodable, {skipped.duplicates} also in validation"
    if not train and not validation:
        raise UserError(f"--source {options.source}: it has no documents ({left_out}); choose a source with text in it")
    if not train:
        if options.separate_validation:
            raise UserError(
                f"--source {options.source}: no document is left to train on ({left_out}); give more documents"
            )
        raise UserError(_other_fraction(options, f"all {validation} documents were chosen for validation", shares))
    if not validation and options.separate_validation:
        read = options.validation
        raise UserError(f"{read.option} {read.source} (split {read.split}): it has no documents; name one that has")
    if not validation:
        raise UserError(_other_fraction(options, f"none of the {train} documents was chosen for validation", shares))


def _other_fraction(options: PrepareOptions, problem: str, shares: DrawnShares) -> str:
    """Return the sentence for a --validation-fraction that gives a split no document, with one that works."""
    begin = f"--validation-fraction {options.validation_fraction}: {problem}"
    # The smallest that holds a document out, in three digits; it leaves one to train on if it is below the largest.
    fraction = float(f"{shares.smallest:.3g}")
    fraction = fraction if fraction > shares.smallest else fraction + 10.0 ** math.floor(math.log10(fraction) - 2)
    if fraction > shares.largest or fraction >= 1:
        fraction = (shares.smallest + shares.largest) / 2
    if not shares.smallest < fraction <= shares.largest:
        return f"{begin}, and all have the same text; give other documents, or --validation-source"
    return f"{begin}; pass {fraction:.15g}, or --validation-source"


def _as_user_error(error: Exception, out: Path) -> Exception:
    """Return the sentence for what the machine refused, or any other error as it is."""
    number = error.errno if isinstance(error, OSError) else None
    # `tokenizers` passes the system's message on without the number.
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return UserError(f"--out {out}: the disk is full ({error}); free some space or name a folder on another disk")
    if number in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        return UserError(
            f"--out {out}: something there is in the way ({error}); look at it, then run again or name another"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            f"--out {out}: not permitted ({error}); name a folder that you may write, and a source you may read"
        )
    return error


def summary(manifest: Manifest, out: Path) -> str:
    """Return a few lines on what a folder holds."""
    lines = [
        f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, "
        f"{split.rows:,} rows of {manifest.sequence_length}"
        for name, split in (("train", manifest.train), ("validation", manifest.validation))
    ]
    skipped = manifest.skipped
    both = manifest.train, manifest.validation
    ratio = sum(split.bytes for split in both) / sum(split.tokens for split in both)
    lines += [
        f"left out: {skipped.empty} empty, {skipped.duplicates} also in validation, {skipped.undecodable} undecodable",
        f"vocabulary of {manifest.tokenizer.vocab_size:,} ({manifest.token_dtype}), {ratio:.2f} bytes a token",
        f"{out} in {manifest.seconds:.1f} s",
    ]
    return "\n".join(lines)
