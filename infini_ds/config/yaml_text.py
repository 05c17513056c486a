"""YAML read twice: as the text that is written, and with the types that YAML guesses from it.

YAML takes `1.10` for a number, `on` for true and `010` for 8. The declared type of a key knows better, so scalars are
handed to it as text; what YAML guesses is used where no type is declared. Both trees have the same form.
"""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from infini_ds.utils.errors import first_line

NULL = ("", "~", "null", "Null", "NULL")  # YAML's spellings


class _TextLoader(yaml.SafeLoader):
    """Reads plain scalars as the text that is written, apart from null."""


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_file(path: Path) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Return a YAML file's keys and values with scalars as text, and with YAML's types.

    Raises:
        ValueError: it is not YAML, or does not hold keys and values.
    """
    try:
        config = OmegaConf.load(path)  # refuses a key that is given twice
        texts = yaml.load(path.read_text(encoding="utf-8"), _TextLoader)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read as YAML: {_reason(error)}") from error
    texts, typed = {} if texts is None else texts, OmegaConf.to_container(config)
    if not isinstance(texts, dict) or not isinstance(typed, dict):
        raise ValueError("does not hold keys and values: write them as key: value")
    return texts, typed


def read_value(value: str) -> tuple[Any, Any]:
    """Return the value of a `key=value` override with scalars as text, and with YAML's types.

    Outside of brackets and quotes the text is taken as it is: `run #2` holds no comment, and `a: b` is no mapping.

    Raises:
        ValueError: it begins as a list, a mapping or a quoted text, but is not valid YAML.
    """
    value = value.strip()
    if value[:1] in ("[", "{", "'", '"'):
        try:
            text = yaml.load(value, _TextLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"cannot be read as YAML: {_reason(error)}") from error
    else:
        text = None if value in NULL else value
    try:
        typed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    except (yaml.YAMLError, OmegaConfBaseException):
        return text, text
    return text, typed["value"] if isinstance(typed, dict) else text


def resolve_interpolations(tree: dict[str, Any]) -> Any:
    """Return the tree with each interpolation, such as `${oc.env:HOME}` or `${steps}`, replaced by its value.

    Raises:
        ValueError: one names something that does not exist.
    """
    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"the interpolation in {error.full_key} cannot be resolved: {first_line(error)}") from error


def has_interpolation(node: Any) -> bool:
    """Return whether a text in the tree holds an interpolation."""
    if isinstance(node, dict):
        return any(has_interpolation(value) for value in node.values())
    if isinstance(node, list):
        return any(has_interpolation(value) for value in node)
    return isinstance(node, str) and "${" in node


def _reason(error: Exception) -> str:
    """Return what is wrong and where, in one line; YAML's own messages have several."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{problem}{place}" if problem else first_line(error)
