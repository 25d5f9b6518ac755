"""Typed values to bytes and back: what fits comes back equal, what does not is refused without a word
of the data."""

from __future__ import annotations

import dataclasses
import enum
import math
import traceback
import uuid
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple, Optional, TypedDict

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgkv import ConfigError, SerializationError
from pgkv._ops.serialize import CodecName, Serializer

CODECS: tuple[CodecName, ...] = ("json", "msgpack")
SECRET = "s3cr3t-marker"


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Address:
    street: str
    number: int = 1


@dataclasses.dataclass
class User:
    id: int
    name: str
    tags: list[str] = dataclasses.field(default_factory=list)
    home: Address | None = None
    colour: Colour = Colour.RED


class Movie(TypedDict):
    title: str
    year: int


class Point(msgspec.Struct):
    x: float
    y: float = 0.0


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    a: int


class Pair(NamedTuple):
    left: int
    right: str


class Account(pydantic.BaseModel):
    id: int
    email: str
    balance: Decimal = Decimal(0)
    opened: datetime | None = None
    owner: Address | None = None


class Even(pydantic.BaseModel):
    value: int

    @pydantic.field_validator("value")
    @classmethod
    def even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd ({SECRET})")
        return value


class Closed(pydantic.BaseModel, extra="forbid"):
    value: int


NOW = datetime(2024, 2, 29, 12, 30, tzinfo=UTC)
VALUES: list[tuple[Any, Any]] = [
    (User, User(1, "é", ["a", "b"], Address("x", 2), Colour.BLUE)),
    (User, User(2, "")),
    (Movie, {"title": "M", "year": 1931}),
    (Point, Point(1.5)),
    (Pair, Pair(1, "x")),
    (Account, Account(id=1, email="a@b", balance=Decimal("1.10"), opened=NOW)),
    (Account, Account(id=1, email="a@b", owner=Address("x"))),
    (list[User], [User(1, "a"), User(2, "b")]),
    (list[Account], [Account(id=1, email="a"), Account(id=2, email="b")]),
    (dict[str, Account], {"x": Account(id=1, email="a")}),
    (Optional[Account], None),  # noqa: UP045  # both spellings
    (Account | None, Account(id=1, email="a")),
    (User | None, None),
    (Optional[User], User(1, "a")),  # noqa: UP045
    (int, 2**63 - 1),
    (int, -(2**63)),
    (float, 0.1),
    (str, "\N{SNOWMAN}\0"),
    (bool, False),
    (None, None),
    (list[int], []),
    (dict[str, int], {"b": 1, "a": 2}),
    (dict[str, Any], {"b": [1, None, True, {"c": "d"}]}),
    (Any, [1, "two", None, {"three": 3.5}]),
    (tuple[int, str], (1, "a")),
    (set[int], {1, 2}),
    (Literal["a", "b"], "a"),
    (datetime, NOW),
    (uuid.UUID, uuid.UUID(int=7)),
    (Decimal, Decimal("1.10")),
    (bytes, b"\x00\xff"),
    (Colour, Colour.BLUE),
]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("type_", "value"), VALUES)
def test_round_trip(type_: Any, value: Any, codec: CodecName) -> None:
    """A value of each kind of type comes back equal, and of the same class."""
    serializer: Serializer[Any] = Serializer(type_, codec)
    raw = serializer.encode("k", value)
    assert isinstance(raw, bytes)
    found = serializer.decode("k", raw)
    assert found == value
    assert type(found) is type(value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=15,
)


@pytest.mark.parametrize("codec", CODECS)
@given(value=JSON)
def test_any_json_value(codec: CodecName, value: Any) -> None:
    """Whatever JSON can say comes back as it was."""
    serializer: Serializer[Any] = Serializer(Any, codec)
    assert serializer.decode("k", serializer.encode("k", value)) == value


@pytest.mark.parametrize("codec", CODECS)
def test_equal_values_have_equal_bytes(codec: CodecName) -> None:
    """The order in which a dict or a set was filled leaves no trace."""
    of_dicts: Serializer[Any] = Serializer(dict[str, Any], codec)
    one, other = {"a": 1, "b": {"x": 1, "y": 2}}, {"b": {"y": 2, "x": 1}, "a": 1}
    assert of_dicts.encode("k", one) == of_dicts.encode("k", other)
    of_movies: Serializer[Movie] = Serializer(Movie, codec)
    assert of_movies.encode("k", {"title": "M", "year": 1}) == of_movies.encode(
        "k", {"year": 1, "title": "M"}
    )
    of_sets: Serializer[set[int]] = Serializer(set[int], codec)
    assert of_sets.encode("k", {1, 1000, 17}) == of_sets.encode("k", {1000, 17, 1})


@pytest.mark.parametrize("codec", CODECS)
def test_equal_models_have_equal_bytes(codec: CodecName) -> None:
    """So it is with dicts inside pydantic's models."""

    class Settings(pydantic.BaseModel):
        values: dict[str, int]

    serializer: Serializer[Settings] = Serializer(Settings, codec)
    one, other = Settings(values={"a": 1, "b": 2}), Settings(values={"b": 2, "a": 1})
    assert one == other
    assert serializer.encode("k", one) == serializer.encode("k", other)


# -- what does not fit

MISFITS: list[tuple[Any, Any, str]] = [
    (User, {"id": SECRET, "name": "x"}, "$.id"),
    (User, {"id": 1}, "$"),
    (User, {"id": 1, "name": "x", "tags": ["a", 7]}, "$.tags[1]"),
    (User, {"id": 1, "name": "x", "home": {"street": SECRET, "number": SECRET}}, "$.home.number"),
    (User, {"id": 1, "name": "x", "colour": SECRET}, "$.colour"),
    (User, [SECRET], "$"),
    (User, None, "$"),
    (Movie, {"title": SECRET}, "$"),
    (Strict, {"a": 1, SECRET: 2}, "$"),
    (Point, {"x": SECRET}, "$.x"),
    (list[User], [{"id": 1, "name": "x"}, {"id": SECRET, "name": "x"}], "$[1].id"),
    (dict[str, int], {SECRET: SECRET}, "$[...]"),
    (Literal["a", "b"], SECRET, "$"),
    (datetime, SECRET, "$"),
    (uuid.UUID, SECRET, "$"),
    (Decimal, SECRET, "$"),
    (int, SECRET, "$"),
    (int, 1.5, "$"),
    (Account, {"id": SECRET, "email": "x"}, "$.id"),
    (Account, {"id": 1}, "$.email"),
    (
        Account,
        {"id": 1, "email": "x", "owner": {"street": SECRET, "number": SECRET}},
        "$.owner.number",
    ),
    (list[Account], [{"id": SECRET, "email": "x"}], "$[0].id"),
    (Even, {"value": 3}, "$.value"),
    (Optional[Account], {"id": SECRET, "email": SECRET}, "$.id"),  # noqa: UP045
    (dict[str, Account], {SECRET: {"id": SECRET, "email": SECRET}}, "$[...].id"),
    (Closed, {"value": 1, SECRET: 2}, "$"),
]


def said(error: BaseException) -> str:
    """All that a log would show of it."""
    return "".join(traceback.format_exception(error, chain=True))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("type_", "wrong", "path"), MISFITS)
def test_wrong_data(type_: Any, wrong: Any, path: str, codec: CodecName) -> None:
    """Data that does not fit is a SerializationError with the key and the path, and neither its text,
    nor its causes, nor its traceback quotes the data."""
    raw = msgspec.json.encode(wrong) if codec == "json" else msgspec.msgpack.encode(wrong)
    serializer: Serializer[Any] = Serializer(type_, codec)
    with pytest.raises(SerializationError) as caught:
        serializer.decode("the-key", raw)
    text = str(caught.value)
    assert "'the-key'" in text
    assert path in text
    assert codec in text
    assert SECRET not in said(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("type_", [User, Movie, Any, Account, list[Account], int])
def test_damaged_bytes(type_: Any, codec: CodecName) -> None:
    """Bytes that are no encoding at all, or half of one, are a SerializationError without the data."""
    serializer: Serializer[Any] = Serializer(type_, codec)
    whole = {"id": 1, "name": SECRET, "title": SECRET, "year": 1, "email": SECRET}
    raw = msgspec.json.encode(whole) if codec == "json" else msgspec.msgpack.encode(whole)
    for damaged in (
        b"",
        raw[:-1],
        raw[:3],
        b"\xc1\xff" + raw,
        raw + b"\x00" + raw,
        b"\x9f\x92\x96",
    ):
        with pytest.raises(SerializationError) as caught:
            serializer.decode("k", damaged)
        assert SECRET not in said(caught.value)
        assert "'k'" in str(caught.value)


@pytest.mark.parametrize("codec", CODECS)
def test_deeply_nested_bytes(codec: CodecName) -> None:
    """Bytes nested deeper than the interpreter can follow are refused like any others."""
    serializer: Serializer[Any] = Serializer(Any, codec)
    deep = b"[" * 100_000 + b"]" * 100_000 if codec == "json" else b"\x91" * 100_000 + b"\x01"
    with pytest.raises(SerializationError):
        serializer.decode("k", deep)


class Opaque:
    def __repr__(self) -> str:
        return SECRET


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "value",
    [Opaque(), {"a": [Opaque()]}, {"a": Opaque()}, LOOP, {Opaque(): 1}],
    ids=["object", "inside", "value", "loop", "key"],
)
def test_what_cannot_be_written(value: Any, codec: CodecName) -> None:
    """A value that the codec cannot express is refused before anything is sent."""
    serializer: Serializer[Any] = Serializer(Any, codec)
    with pytest.raises(SerializationError, match="'k'") as caught:
        serializer.encode("k", value)
    assert SECRET not in said(caught.value)


def test_numbers_without_a_json_form() -> None:
    """What would come back as something else is refused or comes back equal: never a surprise."""
    serializer: Serializer[Any] = Serializer(float, "json")
    for value in (math.nan, math.inf):
        try:
            found = serializer.decode("k", serializer.encode("k", value))
        except SerializationError:
            continue
        assert found == value or (math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize("type_", [User, Account, Point, Movie])
@pytest.mark.parametrize("codec", CODECS)
def test_another_types_value(type_: Any, codec: CodecName) -> None:
    """A value of a wrong type does not become bytes that its own store cannot read."""
    serializer: Serializer[Any] = Serializer(type_, codec)
    for wrong in ("text", 7, [1], {"else": 1}):
        try:
            raw = serializer.encode("k", wrong)
        except SerializationError:
            continue
        with pytest.raises(SerializationError):
            serializer.decode("k", raw)


def test_bad_codecs_and_types() -> None:
    """An unknown codec and a type that cannot be decoded are refused when the store is made."""
    with pytest.raises(ConfigError, match="codec"):
        Serializer(User, "pickle")  # type: ignore[arg-type]
    for bad in (Opaque | User, list[int] | list[str], "NoSuchName", list["NoSuchName"]):  # type: ignore[name-defined]  # noqa: F821
        with pytest.raises(ConfigError, match="cannot be kept"):
            Serializer(bad, "json")
