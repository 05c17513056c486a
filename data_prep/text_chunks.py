"""Splits long texts where a tokenizer divides them anyway, so that the tokens stay the same.

`tokenizers` needs about 120 bytes of memory a character: a document of 100 MB at once would take 12 GB.

A cut is safe if no part of the tokenizer relates what is before it to what is after it: the normalizer changes single
characters and runs of white space, the pre-tokenizer begins a piece there, and the model never looks beyond a piece.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CHUNK_CHARACTERS = 1 << 18  # of each chunk of a long text, at least
# No alternative of GPT-2's pattern extends from a character that is not white space into white space, or looks back;
# nor from a letter or digit into punctuation, or from an ASCII letter into a digit. The letters are those that every
# version of Unicode calls so: ASCII, Cyrillic, kana, Han, Hangul.
_LETTERS = "A-Za-z\u0410-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
GPT2_BOUNDARY = re.compile(rf"(?<=\S)[ \n]|(?<=[{_LETTERS}0-9])[.,;:!?。、，！？；：]|(?<=[A-Za-z])[0-9]")
# A space after a printable ASCII character, which no normalization joins with it.
SPACE_BOUNDARY = re.compile(r"(?<=[!-~]) ")

# Normalizers that change each character by itself, or together with the accents that follow it.
LOCAL_NORMALIZERS = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "StripAccents"}
SPACE_PRE_TOKENIZERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}  # that begin a piece at a space
# Patterns of a Split that no match extends from \S into a space: those of GPT-2, Llama 3 and GPT-4, Qwen 2.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACE_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_WORDS_AND_SPACES}",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_WORDS_AND_SPACES}",
}
Spec = dict[str, Any]


@dataclass(frozen=True)
class Splitter:
    """How long texts may be split for a tokenizer.

    Attributes:
        boundary: matches where a chunk may begin.
        later_chunks: tokenizer.json for all chunks but the first of a text.
    """

    boundary: re.Pattern[str]
    later_chunks: str

    def split(self, text: str) -> Iterator[str]:
        """Yield the chunks of a text, each about CHUNK_CHARACTERS long. Joined they are the text."""
        return split_text(text, boundary=self.boundary)


def split_text(text: str, longest: int | None = None, boundary: re.Pattern[str] = GPT2_BOUNDARY) -> Iterator[str]:
    """Yield the chunks of a text, each about CHUNK_CHARACTERS long. Joined they are the text.

    Args:
        longest: characters of a chunk at most, even if it has to be cut where tokens change.
    """
    begin = 0
    while len(text) - begin > CHUNK_CHARACTERS:
        found = boundary.search(text, begin + CHUNK_CHARACTERS, len(text) if longest is None else begin + longest)
        if found is not None:
            end = found.start()
        elif longest is not None and begin + longest < len(text):
            end = begin + longest
        else:
            break
        yield text[begin:end]
        begin = end
    yield text[begin:]


def find_splitter(tokenizer_json: str) -> Splitter | None:
    """Return how texts are split so that a tokenizer gives the same tokens for the chunks; None if that is unknown."""
    spec: Spec = json.loads(tokenizer_json)
    added = [token for token in spec["added_tokens"] if not token["special"]]
    normalizers, pre_tokenizers = _flatten(spec["normalizer"]), _flatten(spec["pre_tokenizer"])
    if not normalizers and not added and len(pre_tokenizers) == 1 and _is_gpt2(pre_tokenizers[0]):
        return Splitter(GPT2_BOUNDARY, tokenizer_json)
    # A token that was added is found in the text before anything else.
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] or " " in token["content"] for token in added):
        return None
    # What happens at the beginning of a text happens in its first chunk alone.
    later = [part | {"strip_left": False} if part["type"] == "Strip" else part for part in normalizers]
    later = [part for part in later if part["type"] != "Prepend"]
    if (later != normalizers and added) or not all(map(_is_local, later)):
        return None
    space = " "
    for part in normalizers:
        if part["type"] == "Replace" and part["content"] == "▁" and (" " in part["pattern"].values()):
            space = "▁"
        elif part["type"] == "Replace" and part["content"] == "▁" and "Regex" in part["pattern"]:
            space = " or ▁" if space == " " else space
    if not (_begins_piece_at_space(pre_tokenizers, space) or _joins_nothing_to_a_space(spec, pre_tokenizers, space)):
        return None
    changed = spec | {"normalizer": {"type": "Sequence", "normalizers": later} if later else None}
    return Splitter(SPACE_BOUNDARY, tokenizer_json if later == normalizers else json.dumps(changed))


def _flatten(part: Spec | None) -> list[Spec]:
    """Return the parts of a Sequence, or the part alone."""
    if not part:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [leaf for inner in part.get("normalizers") or part.get("pretokenizers") or [] for leaf in _flatten(inner)]


def _is_gpt2(part: Spec) -> bool:
    return part["type"] == "ByteLevel" and part.get("use_regex", True) and not part.get("add_prefix_space", True)


def _is_local(normalizer: Spec) -> bool:
    """Return whether a normalizer gives the same for two parts of a text as for the text, if the second begins " "."""
    if normalizer["type"] == "Strip":
        return not normalizer["strip_left"]
    if normalizer["type"] != "Replace":
        return normalizer["type"] in LOCAL_NORMALIZERS
    pattern, content = normalizer["pattern"], normalizer["content"]
    if "Regex" in pattern:  # a run of spaces
        return pattern["Regex"] in (" {2,}", r"\s+") and content in (" ", "▁")
    if pattern["String"] == " ":
        return content == "▁"
    # A word that a cut before a space cannot divide, and that does not become white space or nothing.
    return " " not in pattern["String"] and content != "" and content == content.strip()


def _begins_piece_at_space(parts: list[Spec], space: str) -> bool:
    """Return whether the pre-tokenizers begin a piece at each space after \\S, and do not look further.

    Args:
        space: what normalizers leave of a space: " ", "▁", or one of the two.
    """
    begins = False
    for part in parts:
        kind, behavior = part["type"], part.get("behavior", "Isolated")
        if kind == "Metaspace":
            begins |= part.get("split", True) and part["replacement"] == "▁"
        elif kind == "ByteLevel":
            begins |= part.get("use_regex", True) and space == " "
        elif kind == "Split":
            pattern, inverted = part["pattern"], part.get("invert", False)
            if pattern.get("Regex") in SPACE_PATTERNS:
                if (behavior, inverted) not in (("Isolated", False), ("Removed", True)):
                    return False
            elif pattern.get("String") != " " or inverted or behavior not in ("Isolated", "Removed", "MergedWithNext"):
                return False
            begins |= space == " "
        elif kind in SPACE_PRE_TOKENIZERS:
            begins |= space == " "
        elif kind not in ("Digits", "Punctuation") or behavior not in ("Isolated", "Removed", "Contiguous"):
            return False
    return begins


def _joins_nothing_to_a_space(spec: Spec, parts: list[Spec], space: str) -> bool:
    """Return whether a BPE without pre-tokenizer, such as Llama 2's, joins no character to a "▁" after it."""
    model = spec["model"]
    options = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    if space != "▁" or model["type"] != "BPE" or any(map(model.get, options)) or "▁" not in model["vocab"]:
        return False
    # Gemma's divides at spaces, of which the normalizer leaves none.
    if any(part["type"] != "Split" or part["pattern"] != {"String": " "} or part.get("invert") for part in parts):
        return False
    return not any("▁" in token.lstrip("▁") for token in model["vocab"])
