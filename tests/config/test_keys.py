"""What the declaration of a key says of it."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from infini_ds.config.keys import Section, Words, is_free, key, list_keys


class Inner(Section):
    text: str = key("a", "a text")
    required: Annotated[int, Field(ge=1)] | Literal["auto"] | None = key(None, "a union", resumable=True)


class Outer(Section):
    ratio: float = key(0.5, "a ratio", gt=0, le=1, remedy="give a share")
    seed: int = key(0, "a seed", ge=0, lt=2**31)
    kind: Literal["x", "y", "z"] = key("x", "a kind")
    path: Annotated[str, Words("a path")] | None = key(None, "a path")
    free: dict[str, Any] = key({}, "anything")
    items: tuple[Inner, ...] = key((), "a list of groups")
    inner: Inner = Inner()


KEYS = {key.name: key for key in list_keys(Outer, elements=True)}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ratio", "a number above 0 and at most 1"),
        ("seed", "an integer of at least 0 and below 2147483648"),
        ("kind", "x, y or z"),
        ("path", "a path or null"),
        ("free", "a group of keys"),
        ("inner.text", "text"),
        ("inner.required", "an integer of at least 1, auto or null"),
        ("items[i].required", "an integer of at least 1, auto or null"),
    ],
)
def test_values_are_described_with_their_bounds(name, values):
    assert KEYS[name].values == values


def test_keys_are_listed_in_order():
    names = ["ratio", "seed", "kind", "path", "free", "items", "inner.text", "inner.required"]
    assert [key.name for key in list_keys(Outer)] == names
    assert KEYS["ratio"].remedy == "give a share" and KEYS["ratio"].default == 0.5
    assert [name for name, key in KEYS.items() if key.resumable] == ["items[i].required", "inner.required"]
    assert KEYS["kind"].meaning == "a kind"


def test_any_type_is_free():
    assert is_free(dict[str, Any]) and is_free(list[dict[str, Any]]) and is_free(Any)
    assert not is_free(dict[str, Inner]) and not is_free(tuple[Inner, ...]) and not is_free(str | None)
