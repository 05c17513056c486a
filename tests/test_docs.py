"""What the documents say: their examples run, the tests that they name exist, and their links lead somewhere."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize(("name", "examples"), [("infini-attention.md", 20), ("hazards.md", 10)])
def test_examples_give_what_is_printed(name, examples):
    text = re.sub(r"^ *```.*$", "", (ROOT / "docs" / name).read_text(), flags=re.MULTILINE)
    result = doctest.DocTestRunner().run(doctest.DocTestParser().get_doctest(text, {}, name, None, 0))
    assert result.attempted > examples and result.failed == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_and_files_that_are_named_exist(document):
    text = document.read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests]
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing += [link for link in links if not (document.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_sections_that_are_linked_exist(document):
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)]+)\)", document.read_text())
    missing = [
        f"{name}#{section}"
        for name, section in links
        if section not in sections(document.parent / name if name else document)
    ]
    assert missing == []


def sections(document: Path) -> set[str]:
    """The names by which GitHub links to its headings."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
