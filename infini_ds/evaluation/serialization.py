"""Read dataclasses from the JSON that `dataclasses.asdict` gives."""

from typing import Any, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")


def from_json(kind: type[T], content: dict[str, Any]) -> T:
    """Return the dataclass `kind` whose `asdict` is `content`. Keys that are not its fields are ignored.

    Raises:
        pydantic.ValidationError: a field is missing, or its value has another type.
    """
    return TypeAdapter(kind).validate_python(content)
