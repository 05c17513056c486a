"""The table of keys in docs/training.md is the one that their declarations give."""

import pytest
from harness import ROOT, run_script

from infini_ds.config.keys import Key, list_keys
from infini_ds.config.recipe import Recipe
from infini_ds.config.reference import BEGIN, END, insert, reference
from infini_ds.utils.errors import UserError

DOCUMENT = ROOT / "docs" / "training.md"
KEYS = list(list_keys(Recipe, elements=True))


def test_the_document_holds_todays_table():
    text = DOCUMENT.read_text()
    assert insert(text) == text, "run python -m infini_ds.config.reference --write docs/training.md"


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_each_key_has_a_line_with_a_meaning(key: Key):
    lines = [line for line in reference().splitlines() if line.startswith(f"| `{key.name}` |")]
    assert len(lines) == 1 and key.meaning and f"| {key.meaning} |" in lines[0]
    assert lines[0].endswith("| may change |") == key.resumable
    assert lines[0].count(" | ") == 4, "a cell would be cut in two"


def test_the_module_prints_the_table_and_writes_it(tmp_path):
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    run_script("-m", "infini_ds.config.reference", "--write", document)
    assert document.read_text() == f"before\n{BEGIN}\n{reference()}{END}\nafter\n"
    assert run_script("-m", "infini_ds.config.reference").stdout == reference()


def test_a_document_without_markers_is_refused():
    with pytest.raises(UserError, match="put them where it goes"):
        insert("nothing")
