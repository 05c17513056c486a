"""Builds a section from layers: its defaults, then a YAML file, then `key=value` overrides.

Every mistake is one UserError: the key with its value, where it was given, what it must be.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from infini_ds.config.keys import Key, Section, element_section, is_free, list_keys, section_of
from infini_ds.config.yaml_text import has_interpolation, read_file, read_value, resolve_interpolations
from infini_ds.utils.errors import UserError, nearest
from infini_ds.utils.paths import user_path

COMMAND_LINE = "on the command line"

S = TypeVar("S", bound=Section)
KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Given:
    """What a layer gives for a key. text: scalars as written. origin: "in FILE". layer: its number."""

    field: FieldInfo
    text: Any
    origin: str
    layer: int


class Loader(Generic[S]):
    """Collects layers of keys of `kind`, of which a later one overrides the earlier ones, and builds it.

    Args:
        kind: a section all of whose keys have defaults.
        renamed: earlier names of keys and groups -> today's.
        read_renamed: accept the earlier names. Otherwise they are unknown keys, and today's name is suggested.
        alternatives: pairs of keys, of which one that is given in a later layer replaces the other.
        synonyms: last parts of keys that other projects have -> the key here, for hints.
    """

    def __init__(
        self,
        kind: type[S],
        renamed: Mapping[str, str] | None = None,
        read_renamed: bool = False,
        alternatives: Sequence[tuple[str, str]] = (),
        synonyms: Mapping[str, str] | None = None,
    ):
        self.kind = kind
        self.renamed = renamed or {}
        self.read_renamed = read_renamed
        self.alternatives = alternatives
        self.synonyms = synonyms or {}
        self._layers = 0
        self._given: dict[KeyPath, Given] = {}
        self._typed: dict[str, Any] = kind().model_dump(mode="json")  # all layers, merged, with YAML's types

    def add_file(self, option: str, path: str | Path, shipped: str | None = None) -> None:
        """Add a YAML file as a layer.

        Args:
            option: what names the file in an error.
            shipped: folder of the project's own such files, which are listed if the file does not exist.
        Raises:
            UserError: the file does not exist, is not YAML, or has a key that is unknown or of another form.
        """
        file = user_path(str(path))
        if not file.is_file():
            known = ", ".join(sorted(str(p) for p in Path(shipped).glob("*.yaml"))) if shipped else ""
            raise UserError(f"{option} {path} does not exist" + (f"; known are {known}" if known else ""))
        try:
            texts, typed = read_file(file)
        except ValueError as error:
            raise UserError(f"{option} {path} {error}") from error
        self._layers += 1
        self._add(texts, typed, f"in {path}")

    def add_overrides(self, overrides: Sequence[str], origin: str = COMMAND_LINE) -> None:
        """Add `key=value` overrides as a layer; a key has dots between its groups.

        Raises:
            UserError: an override is not of this form, or its key is unknown or of another form.
        """
        self._layers += 1
        for override in overrides:
            name, equals, value = override.partition("=")
            if not equals or not name.strip():
                raise UserError(f"override {override!r} is not of the form key=value, such as steps=100")
            try:
                text, typed = read_value(value)
            except ValueError as error:
                raise UserError(f"{override} {origin} {error}") from error
            path = name.strip().split(".")
            self._add(_nest(path, text), _nest(path, typed), origin)

    def build(self) -> S:
        """Return the section with all layers.

        Raises:
            UserError: a value is not what its key may be; the sentence is about the first such key.
        """
        self._drop_replaced()
        typed = self._typed
        if any(has_interpolation(given.text) for given in self._given.values()):
            try:
                typed = resolve_interpolations(typed)
            except ValueError as error:
                raise UserError(str(error)) from error
        raw: dict[str, Any] = {}
        for path, given in self._given.items():
            by_yaml = is_free(given.field.annotation) or has_interpolation(given.text)
            _put(raw, path, _get(typed, path) if by_yaml else given.text)
        try:
            return self.kind.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            raise self._refusal(first["loc"], first["type"], raw) from error

    def error(self, names: Sequence[str], sentence: str) -> UserError:
        """Return an error about these keys that says where each of them was given."""
        given = [(name, self._given.get(tuple(name.split(".")))) for name in names]
        places = ", ".join(f"{name} {found.origin}" for name, found in given if found)
        return UserError(f"{sentence} ({places})" if places else sentence)

    def _add(self, texts: dict[str, Any], typed: dict[str, Any], origin: str) -> None:
        for path, field, text, value in self._walk(texts, typed, self.kind, (), origin):
            self._given[path] = Given(field, text, origin, self._layers)
            _merge(self._typed, path, value)

    def _walk(
        self, texts: dict[str, Any], typed: dict[str, Any], kind: type[Section], above: KeyPath, origin: str
    ) -> Iterator[tuple[KeyPath, FieldInfo, Any, Any]]:
        """Yield (path, field, text, value with YAML's type) of each key, after a check of its name and form."""
        for (key, text), value in zip(texts.items(), typed.values(), strict=True):
            head, dot, rest = str(key).partition(".")
            if dot:  # a file may write the path of a key in one line
                text, value = _nest(rest.split("."), text), _nest(rest.split("."), value)
            head = self._current_name(head, kind, above, origin)
            path, field = (*above, head), kind.model_fields[head]
            section, element = section_of(field.annotation), element_section(field.annotation)
            if section is not None:
                _check_group(path, text, section, origin)
                yield from self._walk(text, value, section, path, origin)
            elif element is not None and get_origin(field.annotation) is dict and isinstance(text, dict):
                for (part, inner), inner_value in zip(text.items(), value.values(), strict=True):
                    _check_group((*path, str(part)), inner, element, origin)
                    yield (*path, str(part)), field, {}, {}
                    yield from self._walk(inner, inner_value, element, (*path, str(part)), origin)
            else:
                if isinstance(text, dict) and get_origin(field.annotation) is not dict:
                    words = Key(".".join(path), field).values
                    raise UserError(f"{'.'.join(path)} {origin} must be {words}, not a group of keys")
                if element is not None and isinstance(text, list):
                    self._check_elements(path, text, element, origin)
                yield path, field, text, value

    def _check_elements(self, path: KeyPath, texts: list[Any], kind: type[Section], origin: str) -> None:
        """Raise a UserError if an element of a list is not a group of keys of `kind`."""
        for i, text in enumerate(texts):
            place = (*path[:-1], f"{path[-1]}[{i}]")
            _check_group(place, text, kind, origin)
            for name in text:
                self._current_name(str(name), kind, place, origin)

    def _current_name(self, name: str, kind: type[Section], above: KeyPath, origin: str) -> str:
        """Return the name of a field of `kind`, also for its earlier name, or raise a UserError."""
        if name in kind.model_fields:
            return name
        full = ".".join((*above, name))
        renamed = self.renamed.get(full)
        if renamed and self.read_renamed:
            return renamed.rpartition(".")[2]
        if renamed:
            raise UserError(f"unknown key {full} {origin}: did you mean {renamed}, its name today?")
        raise UserError(f"unknown key {_visible(full)} {origin}{self._hint(name, kind, above)}")

    def _hint(self, name: str, kind: type[Section], above: KeyPath) -> str:
        """Return what may be meant by the unknown key `name` of `kind`: a key anywhere that is called so, or nearly."""
        names = [".".join((*above, key)) for key in kind.model_fields] + [key.name for key in list_keys(self.kind)]
        by_last_part = {known.rpartition(".")[2]: known for known in reversed(names)}
        plain = name.strip(" +-").lower().replace("-", "_")
        found = by_last_part.get(plain) or self.synonyms.get(plain)
        if found is None:
            found = by_last_part.get(nearest(plain, by_last_part) or "")
        return f": did you mean {found}?" if found else f"; known are {', '.join(kind.model_fields)}"

    def _drop_replaced(self) -> None:
        """Of two alternatives, forget the one that an earlier layer gives."""
        for pair in self.alternatives:
            paths = [path for name in pair if (path := tuple(name.split("."))) in self._given]
            paths = [path for path in paths if self._given[path].text]  # an empty list or null replaces nothing
            newest = max((self._given[path].layer for path in paths), default=0)
            for path in paths:
                if self._given[path].layer < newest:
                    del self._given[path]

    def _refusal(self, location: tuple[int | str, ...], kind: str, raw: Any) -> UserError:
        """Return the error for the value at pydantic's `location`, whose last parts may be members of a union."""
        section: type[Section] | None = self.kind
        name, field, value, origin = "", None, raw, ""
        path: KeyPath = ()
        for part in location:
            if isinstance(part, str) and section is not None and part in section.model_fields:
                field = section.model_fields[part]
                section = section_of(field.annotation)
                name = f"{name}.{part}" if name else part
            elif field is not None and section is None and element_section(field.annotation):
                section = element_section(field.annotation)
                name = f"{name}[{part}]" if isinstance(part, int) else f"{name}.{part}"
            else:
                break
            value = _child(value, part)
            path = (*path, str(part))
            origin = self._given[path].origin if path in self._given else origin
        assert field is not None
        key = Key(name, field)
        if kind == "missing":
            group, _, last = name.rpartition(".")
            return UserError(f"{group} {origin} has no {last}: give it {key.meaning}")
        words = key.values.replace("a number", "a finite number") if kind == "finite_number" else key.values
        remedy = f": {key.remedy}" if key.remedy else ""
        return UserError(f"{name}={show(value)} {origin} must be {words}{remedy}")


def load_keys(kind: type[S], path: str | Path | None, overrides: Sequence[str], option: str, shipped: str) -> S:
    """Return `kind` with its defaults, overridden by a YAML file, then by `key=value` overrides.

    Args:
        option: what names the file on the command line.
        shipped: folder of the project's own such files, which are listed if `path` does not exist.
    Raises:
        UserError: the file does not exist, a key is unknown (the nearest known one is named), or a value is refused.
    """
    loader = Loader(kind)
    if path is not None:
        loader.add_file(option, path, shipped)
    loader.add_overrides(overrides)
    return loader.build()


def show(value: Any) -> str:
    """Return a value as a recipe writes it: null, not None."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _visible(name: str) -> str:
    """Return a key as it is written, or with escapes if it holds white space or what has no form."""
    return name if name.isprintable() and name == "".join(name.split()) and name else repr(name)


def _check_group(path: KeyPath, text: Any, kind: type[Section], origin: str) -> None:
    if not isinstance(text, dict):
        name, first = ".".join(path), next(iter(kind.model_fields))
        raise UserError(f"{name}={show(text)} {origin} must be a group of keys, such as {name}.{first}")


def _nest(path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for the path ("a", "b")."""
    for part in reversed(path):
        value = {part: value}
    return value


def _put(tree: dict[str, Any], path: KeyPath, value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _get(tree: Any, path: KeyPath) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _child(value: Any, part: int | str) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) else None


def _merge(tree: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Put `value` at the path; a mapping is merged into one that is already there."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    there = tree.get(path[-1])
    if isinstance(there, dict) and isinstance(value, dict):
        for name, inner in value.items():
            _merge(there, (str(name),), inner)
    else:
        tree[path[-1]] = value
