"""The field's standard terms: words that this project once used in a private sense stay out of code and documents."""

import re
import subprocess

import pytest
from harness import ROOT

SUFFIXES = (".py", ".md", ".yaml", ".yml", ".sbatch", ".cfg", ".toml", ".svg", "Makefile")
# Each with what to write instead.
PRIVATE = {
    r"\bbehind\b": "after",
    r"\bmend(s|ed|ing)?\b": "fix, repair",
    r"\banew\b": "again, from scratch",
    r"\bpassed over\b": "skipped",
    r"\bgo(es)? on from\b": "resumes from",
    r"\bis none\b": "does not exist, is NaN",
    r"\btold to\b": "asked to",
    r"\bfar away\b": "remote",
    r"\bill(s)?\b": "problem",
    r"\bmeeting\b": "rendezvous",
    r"\bcommonest\b": "majority baseline",
    r"\bshared out\b": "split across ranks",
    r"\bcounts for nothing\b": "is ignored",
    r"\bclaim(s|ed)?\b": "lock, statement",
    r"\bmarks?\b": "manifest, record",
}
# Where a word stands in its ordinary sense.
ORDINARY = [
    r"pytest\.mark\b|\bmarks=",
    r"byte-order mark",
    r"Maria Mark Martin",  # first names of the synthetic texts
    r"\bproblem_mark\b|\bmark\.(line|column)\b|\bmark = |if mark else|, mark\b",  # PyYAML's name for a place in a file
]
FILES = [
    name
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if name.endswith(SUFFIXES) and name != "tests/test_words.py" and (ROOT / name).exists()
]


@pytest.mark.parametrize("name", FILES)
def test_words_are_standard_terms(name):
    found = []
    for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
        for ordinary in ORDINARY:
            line = re.sub(ordinary, "", line)
        line = line.replace("is None", "")
        found += [
            f"line {number}: {match[0]!r}: write {instead}"
            for word, instead in PRIVATE.items()
            for match in re.finditer(word, line, re.IGNORECASE)
        ]
    assert not found, f"{name}\n" + "\n".join(found)


TERMS = ["NaN", "rollback", "manifest", "checksum", "headroom", "baseline", "rendezvous", "broadcast", "micro-batch"]


@pytest.mark.parametrize("term", TERMS)
def test_a_reader_who_searches_for_a_term_finds_the_place(term):
    code = [name for name in FILES if name.endswith(".py") and not name.startswith("tests/")]
    assert any(re.search(rf"\b{term}", (ROOT / name).read_text(), re.IGNORECASE) for name in code)
