"""Text to tokenizer and shards: the whole of `python -m data_prep`, callable.

    from data_prep.prepare import PrepareOptions, prepare
    manifest = prepare(PrepareOptions(source="stdlib", out="corpus", vocab_size=4096))

The folder holds tokenizer/, train/, validation/ and manifest.json.
"""

import errno
import os
import time
from contextlib import closing
from pathlib import Path

from data_prep.atomic_dir import LOCK, build_folder
from data_prep.encode import encode_documents
from data_prep.manifest import FORMAT_VERSION, NAME, Manifest, load_manifest, package_versions, save_manifest
from data_prep.options import PrepareOptions, check, shaping
from data_prep.packing import token_dtype
from data_prep.progress import Progress, show_progress
from data_prep.shards import split_writer
from data_prep.splits import Skipped, split_documents, training_texts, validation_digests
from data_prep.tokenizer import TokenizerFacts, load_tokenizer, save_tokenizer, train_tokenizer, word_tokenizer
from infini_ds.utils.errors import UserError

__all__ = ["Manifest", "PrepareOptions", "load_manifest", "prepare", "summary"]

ENTRIES = {"tokenizer", "train", "validation", NAME, LOCK}


def prepare(options: PrepareOptions, quiet: bool = False) -> Manifest:
    """Makes `options.out`, or finds it finished with the same options, and returns its manifest.

    Raises a ValueError sentence for whatever the user can mend; `out` is then as it was. Prints progress on stderr and
    a summary on stdout unless `quiet`. Starts processes, so a script that calls it needs `if __name__ == "__main__":`.
    """
    check(options)
    out = Path(options.out).resolve()  # a link stays; what it points to is made
    replace = False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        finished = find_finished(out, options)
        if finished is not None:
            if not quiet:
                print(f"{out} is finished and was made with the same options: nothing to do")
            return finished
        replace = True
    try:
        with show_progress(quiet) as progress, build_folder(out, replace) as partial:
            manifest = build(options, partial, progress)
    except Exception as error:
        raise explained(error, out) from error
    if not quiet:
        print(summary(manifest, out))
    return manifest


def find_finished(out: Path, options: PrepareOptions) -> Manifest | None:
    """The manifest of a folder that can stay, None where --force lets it be replaced; else ValueError."""
    if not (out / NAME).is_file():
        raise UserError(
            f"--out {out}: it is there already and data_prep did not finish it; name another, or remove it yourself"
        )
    differing = differences(load_manifest(out), options) if not options.force else None
    if differing == "":
        return load_manifest(out)
    if differing:
        raise UserError(
            f"--out {out}: it was made with other options ({differing}); pass --force to replace it, or another --out"
        )
    foreign = sorted(path.name for path in out.iterdir() if path.name not in ENTRIES)
    if foreign:
        raise UserError(
            f"--force: {out} also holds {', '.join(foreign)}, which data_prep did not write; move that away first"
        )
    return None


def differences(manifest: Manifest, options: PrepareOptions) -> str:
    """The options that differ, in words; empty where none does."""
    asked = shaping(options)
    return ", ".join(
        f"--{name.replace('_', '-')} {manifest.options.get(name)} there, {value} here"
        for name, value in asked.items()
        if manifest.options.get(name) != value
    )


def build(options: PrepareOptions, folder: Path, progress: Progress) -> Manifest:
    """Fills an empty folder, the manifest last."""
    begun = time.monotonic()
    if options.separate_validation:
        progress.phase("reading validation documents")
    held_out = validation_digests(options)
    tokenizer = make_tokenizer(options, held_out, folder / "tokenizer", progress)

    progress.phase("starting to tokenize")
    skipped = Skipped()
    shape = (options.sequence_length, tokenizer.vocab_size, tokenizer.pad_id, options.shard_bytes, options.has_answers)
    with split_writer(folder / "train", *shape) as train, split_writer(folder / "validation", *shape) as validation:
        writers = {"train": train, "validation": validation}
        documents = split_documents(options, held_out, skipped)
        tokenizer_json = folder / "tokenizer" / "tokenizer.json"
        workers = options.workers or os.cpu_count() or 1
        progress.phase("tokenizing")
        with closing(encode_documents(documents, tokenizer_json, tokenizer.start_id, workers)) as encoded:
            for piece in encoded:
                writers[piece.split].add(piece)
                progress.advance(piece.starts, len(piece.ids))
        check_splits_filled(options, train.counts.documents, validation.counts.documents, skipped)

    manifest = Manifest(
        format_version=FORMAT_VERSION,
        options=shaping(options),
        sequence_length=options.sequence_length,
        token_dtype=token_dtype(tokenizer.vocab_size),
        tokenizer=tokenizer,
        train=train.counts,
        validation=validation.counts,
        skipped=skipped,
        versions=package_versions(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=round(time.monotonic() - begun, 1),
    )
    save_manifest(manifest, folder)
    return manifest


def make_tokenizer(
    options: PrepareOptions, held_out: frozenset[int] | None, folder: Path, progress: Progress
) -> TokenizerFacts:
    if not options.trains_tokenizer:
        progress.phase("loading the tokenizer")
        return save_tokenizer(load_tokenizer(options.tokenizer), folder, "loaded")
    words = options.words
    if words is not None:
        return save_tokenizer(word_tokenizer(words), folder, "words")
    progress.phase("training the tokenizer")
    texts = training_texts(options, held_out)
    return save_tokenizer(train_tokenizer(texts, options.vocab_size, options.tokenizer_bytes), folder, "trained")


def check_splits_filled(options: PrepareOptions, train: int, validation: int, skipped: Skipped) -> None:
    """Raises a ValueError sentence where a split has no document."""
    left_out = f"{skipped.empty} empty, {skipped.undecodable} undecodable, {skipped.duplicates} also in validation"
    if not train and not validation:
        raise UserError(
            f"--source {options.source}: it gives no document ({left_out}); choose a source with text in it"
        )
    if not train:
        raise UserError(f"--source {options.source}: no document is left to train on ({left_out}); give more documents")
    if not validation and options.separate_validation:
        read = options.validation
        raise UserError(f"{read.option} {read.source} (split {read.split}): it gives no document; name one that does")
    if not validation:
        raise UserError(
            f"--validation-fraction {options.validation_fraction}: none of the {train} documents fell to validation; "
            "pass a larger share, or --validation-source"
        )


def explained(error: Exception, out: Path) -> Exception:
    """A sentence for what the machine refused; any other error as it is."""
    number = error.errno if isinstance(error, OSError) else None
    # `tokenizers` passes the system's words on without the number.
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
    """A few lines for people."""
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
