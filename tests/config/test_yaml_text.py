"""YAML as text and with its own types: both trees have the same form."""

import pytest

from infini_ds.config.yaml_text import has_interpolation, read_file, read_value, resolve_interpolations


@pytest.mark.parametrize(
    ("value", "text", "typed"),
    [
        ("1.10", "1.10", 1.1),
        (" on ", "on", True),
        ("010", "010", 8),
        ("", None, None),
        ("null", None, None),
        ("'null'", "null", "null"),
        ('"1.10"', "1.10", "1.10"),
        ("run #2", "run #2", "run"),
        ("a: b: c", "a: b: c", "a: b: c"),
        ("[1e-3, {a: on}, ~]", ["1e-3", {"a": "on"}, None], [1e-3, {"a": True}, None]),
        ("${seed}", "${seed}", "${seed}"),
    ],
)
def test_values_of_the_command_line(value, text, typed):
    assert read_value(value) == (text, typed)


def test_files(tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text("base: &base {a: 1.0}\nb: {<<: *base, c: 2024-01-01, on: 0x10}\n")
    texts, typed = read_file(file)
    assert texts == {"base": {"a": "1.0"}, "b": {"a": "1.0", "c": "2024-01-01", "on": "0x10"}}
    assert typed == {"base": {"a": 1.0}, "b": {"a": 1.0, "c": "2024-01-01", True: 16}}
    file.write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        read_file(file)


@pytest.mark.parametrize("value", ["[1", "{a", "'x", '"x" y'])
def test_brackets_and_quotes_have_to_be_closed(value):
    with pytest.raises(ValueError, match=r"cannot be read as YAML: .*\(line 1, column \d+\)$"):
        read_value(value)


def test_interpolations():
    assert has_interpolation({"a": ["x", {"b": "${c}"}]}) and not has_interpolation({"a": ["$c", 3, None]})
    assert resolve_interpolations({"a": "x${b}", "b": 3}) == {"a": "x3", "b": 3}
    with pytest.raises(ValueError, match="interpolation in a cannot be resolved"):
        resolve_interpolations({"a": "${nothing}"})
