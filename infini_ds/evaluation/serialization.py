"""Dataclasses of results as JSON, and back."""

from typing import Any, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")


def to_json(value: object) -> dict[str, Any]:
    """Return the JSON form of a dataclass. Fields that have a default are left out where they are equal to it."""
    return TypeAdapter(type(value)).dump_python(value, exclude_defaults=True)


def from_json(kind: type[T], content: dict[str, Any]) -> T:
    """Return the dataclass `kind` that has this JSON form. Keys that are not its fields are ignored.

    Raises:
        pydantic.ValidationError: a field is missing, or its value has another type.
    """
    return TypeAdapter(kind).validate_python(content)
