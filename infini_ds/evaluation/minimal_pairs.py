"""Read minimal pairs of sentences: BLiMP's 67 files, BabyLM's files of categories and its supplement, or the hub."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from infini_ds.utils.errors import UserError, first_line
from infini_ds.utils.hashing import sha256_of_json

ENDINGS = (".jsonl", ".json")
Row = dict[str, Any]


class Paradigm(NamedTuple):
    """phenomenon: BabyLM's category, or `linguistics_term` of the data. pairs: (good, bad) sentences.

    supplement: whether it is of BabyLM's supplement, which is not part of BLiMP.
    """

    name: str
    phenomenon: str
    pairs: list[tuple[str, str]]
    supplement: bool = False

    def sha256(self) -> str:
        return sha256_of_json(self.pairs)


def read_paradigms(path: str, limit: int | None) -> list[Paradigm]:
    """Return the first `limit` pairs (None: all) of each paradigm, from a folder or the hub.

    Raises:
        UserError: no such folder or dataset, a file is not in BLiMP's format, or a paradigm is in two files.
    """
    if not Path(path).is_dir():
        paradigms = [each for name, rows in read_from_hub(path).items() for each in split_file(name, rows, False)]
    else:
        paradigms = read_folder(Path(path))
    return [paradigm._replace(pairs=paradigm.pairs[:limit]) for paradigm in paradigms]


def read_folder(folder: Path) -> list[Paradigm]:
    """Return all paradigms of a folder and its subfolders.

    Files below a folder whose name has "supplement" in it are BabyLM's supplement. Where some subfolders are named
    blimp... or supplement..., as in BabyLM's evaluation data, only those are read.
    """
    named = [each for each in sorted(folder.iterdir()) if each.is_dir() and _is_pairs_folder(each.name)]
    files = [file for each in named or [folder] for file in find_files(each)]
    if not files:
        raise UserError(
            f"--blimp {folder} holds no {' or '.join(ENDINGS)} files: name the folder with BLiMP's 67, its data/, or "
            "BabyLM's, with blimp_filtered/ and supplement_filtered/"
        )
    origin: dict[tuple[str, bool], Path] = {}
    paradigms = []
    for file in files:
        parents = (folder.resolve().name, *file.relative_to(folder).parts[:-1])
        supplement = any("supplement" in part.lower() for part in parents)
        for paradigm in split_file(file.stem, read_file(file), supplement):
            first = origin.setdefault((paradigm.name, supplement), file)
            if first != file:
                raise UserError(
                    f"--blimp {folder}: {paradigm.name} is in {first} and in {file}: name a folder that holds it once"
                )
            paradigms.append(paradigm)
    return paradigms


def _is_pairs_folder(name: str) -> bool:
    return name.lower().startswith(("blimp", "supplement"))


def find_files(folder: Path) -> list[Path]:
    """Return all files with BLiMP's endings below a folder, sorted, also through links, without hidden ones."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.suffix.lower() in ENDINGS)


def split_file(name: str, rows: list[Row], supplement: bool) -> list[Paradigm]:
    """Return the paradigms of a file: one, or those that the UIDs of its rows name.

    A file of several paradigms is a category of BabyLM, and its name is their phenomenon.
    """
    by_paradigm: dict[str, list[Row]] = {}
    for row in rows:
        uid = row.get("UID")
        by_paradigm.setdefault(uid if uid and not supplement else name, []).append(row)
    if len(by_paradigm) == 1:
        by_paradigm = {name: rows}
    paradigms = []
    for paradigm, its_rows in sorted(by_paradigm.items()):
        category = name if len(by_paradigm) > 1 else its_rows[0].get("linguistics_term") or name
        pairs = [(row["sentence_good"], row["sentence_bad"]) for row in its_rows]
        paradigms.append(Paradigm(paradigm, "supplement" if supplement else category, pairs, supplement))
    return paradigms


def read_file(file: Path) -> list[Row]:
    """Return the rows of a file of JSON lines (or of one JSON list), checked for the two sentences."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        # Not `splitlines`, which divides at characters that JSON allows in its strings.
        rows = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(x) for x in text.split("\n") if x.strip()]
        if not rows or not all(row["sentence_good"] and row["sentence_bad"] for row in rows):
            raise ValueError("the file or a sentence is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--blimp: {file} is not a BLiMP file ({error}): each line is JSON with sentence_good and sentence_bad"
        ) from error
    return rows


def read_from_hub(name: str) -> dict[str, list[Row]]:
    """Return the rows of each paradigm of a dataset on the hub."""
    import datasets  # takes seconds, and is rarely needed

    try:
        names = sorted(datasets.get_dataset_config_names(name))
        return {each: datasets.load_dataset(name, each, split="train").to_list() for each in names}
    except Exception as error:  # of several libraries
        raise UserError(
            f"--blimp {name}: no such folder, and no such dataset on the hub ({first_line(error)}): fetch BLiMP from "
            "github.com/alexwarstadt/blimp and name its folder data/"
        ) from error
