"""Documents of which a command writes a part: what is between the markers, and which documents are refused."""

import pytest

from infini_ds.utils.documents import insert_between, read_document
from infini_ds.utils.errors import UserError


def test_only_what_is_between_the_markers_changes():
    document = "before\n<!-- a -->\nold\n<!-- end -->\nbetween\n<!-- b -->\nold\n<!-- end -->\nafter\n"
    changed = insert_between(document, "<!-- b -->", "<!-- end -->", "new\nlines\n")
    assert changed == "before\n<!-- a -->\nold\n<!-- end -->\nbetween\n<!-- b -->\nnew\nlines\n<!-- end -->\nafter\n"


@pytest.mark.parametrize("document", ["no markers", "<!-- a -->\nold\n", "<!-- end -->\n<!-- a -->\n"])
def test_a_document_without_both_markers_is_refused(document):
    with pytest.raises(UserError, match="--write: the document does not have the lines <!-- a --> and <!-- end -->"):
        insert_between(document, "<!-- a -->", "<!-- end -->", "new\n")


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file or directory"), (b"\xff", "it is not UTF-8")])
def test_a_document_that_cannot_be_read_is_named(content, reason, tmp_path):
    file = tmp_path / "doc.md"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"--write {file} cannot be read \({reason}\)"):
        read_document(file)
