"""How a section of a recipe declares its keys, and how the loader, the reference and the check on resume read them.

class BatchSection(Section):
    micro_rows: int = key(1, "rows that a rank computes at a time, at most", ge=1, resumable=True)
"""

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A group of keys: frozen; an unknown key, or a value of another type or out of bounds, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Words:
    """In an `Annotated` type: what its values are called, with the article, such as "a path"."""

    text: str


def key(default: Any, meaning: str, *, resumable: bool = False, remedy: str = "", **bounds: float) -> Any:
    """Declare a key of a section.

    Args:
        default: its value where nothing gives one; `...` if it has to be given.
        meaning: help text, a phrase.
        resumable: whether a resumed run may have another value than the run was begun with.
        remedy: what to do about a value that is refused, if that is more than to give another one.
        bounds: `ge`, `gt`, `le`, `lt` of a number.
    """
    extra: dict[str, Any] = {"resumable": resumable, "remedy": remedy}
    return Field(default, description=meaning, json_schema_extra=extra, **typing.cast(Any, bounds))


@dataclass(frozen=True)
class Key:
    """One key as its section declares it. name: with dots, such as "batch.rows"."""

    name: str
    field: FieldInfo

    @property
    def meaning(self) -> str:
        return self.field.description or ""

    @property
    def default(self) -> Any:
        return self.field.get_default(call_default_factory=True)

    @property
    def resumable(self) -> bool:
        return bool(self._extra.get("resumable"))

    @property
    def remedy(self) -> str:
        return str(self._extra.get("remedy", ""))

    @property
    def values(self) -> str:
        """What it may be, with its bounds and the article, such as "an integer of at least 1"."""
        return describe_type(self.field.annotation, self.field.metadata)

    @property
    def _extra(self) -> dict[str, Any]:
        extra = self.field.json_schema_extra
        return extra if isinstance(extra, dict) else {}


def list_keys(kind: type[Section], prefix: str = "", elements: bool = False) -> Iterator[Key]:
    """Yield the keys of `kind` and of the sections in it, in their order.

    Args:
        elements: yield the keys of the sections in a list too, as "data.streams[i].path".
    """
    for name, field in kind.model_fields.items():
        section, element = section_of(field.annotation), element_section(field.annotation)
        if section is not None:
            yield from list_keys(section, f"{prefix}{name}.", elements)
        else:
            yield Key(f"{prefix}{name}", field)
        if elements and element is not None:
            yield from list_keys(element, f"{prefix}{name}[i].", elements)


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section that a field of this type is, or None if it is a value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def element_section(annotation: Any) -> type[Section] | None:
    """Return the section that each element of a list, or each value of a dict, of this type is, if it is one."""
    if get_origin(annotation) not in (tuple, list, dict):
        return None
    return next((found for argument in get_args(annotation) if (found := section_of(argument))), None)


def is_free(annotation: Any) -> bool:
    """Return whether values of this type, or parts of them, are of any type: YAML decides it then."""
    return annotation is Any or any(is_free(argument) for argument in get_args(annotation))


def describe_type(annotation: Any, metadata: list[Any]) -> str:
    """Return what values of this type are called, with the article and the bounds that are in `metadata`."""
    while get_origin(annotation) is Annotated:
        annotation, *own = get_args(annotation)
        for part in own:
            metadata = [*metadata, *(part.metadata if isinstance(part, FieldInfo) else [part])]
    for part in metadata:
        if isinstance(part, Words):
            return part.text
    if get_origin(annotation) in (Union, UnionType):
        members = [argument for argument in get_args(annotation) if argument is not NoneType]
        kinds = [kind for member in members for kind in _choices(member) or [describe_type(member, metadata)]]
        return _join([*kinds, "null"] if NoneType in get_args(annotation) else kinds)
    if choices := _choices(annotation):
        return _join(choices)
    if annotation in (int, float):
        return ("an integer" if annotation is int else "a number") + _describe_bounds(metadata)
    if get_origin(annotation) is dict or section_of(annotation):
        return "a group of keys"
    return {bool: "true or false", str: "text"}.get(annotation, "a list")


def _choices(annotation: Any) -> list[str]:
    """Return the values of a Literal, else []."""
    return [str(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else []


def _describe_bounds(metadata: list[Any]) -> str:
    """Return " of at least 0 and below 1" for the bounds `ge=0, lt=1`."""
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [
        f"{phrase} {int(bound) if bound == int(bound) else bound}"
        for name, phrase in words.items()
        for part in metadata
        if (bound := getattr(part, name, None)) is not None
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _join(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
