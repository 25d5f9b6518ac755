"""Typed values to bytes and back: what fits comes back equal, what does not is refused without a word
of the data."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import traceback
import uuid
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple, Optional, TypedDict

import msgspec
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgkv import ConfigError, SerializationError
from pgkv._ops.serialize import CodecName, Serializer, changed

CODECS: tuple[CodecName, ...] = ("json", "msgpack")
SECRET = "s3cr3t-marker"


class Opaque:
    def __repr__(self) -> str:
        return SECRET


LOOP: list[Any] = []
LOOP.append(LOOP)


class Variant(enum.Enum):
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
    variant: Variant = Variant.RED


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
    (User, User(1, "é", ["a", "b"], Address("x", 2), Variant.BLUE)),
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
    (Variant, Variant.BLUE),
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
@given(value=JSON)
def test_any_order(codec: CodecName, value: Any) -> None:
    """Dicts come back in the order in which they were filled, at every level."""
    serializer: Serializer[Any] = Serializer(Any, codec)
    assert repr(serializer.decode("k", serializer.encode("k", value))) == repr(value)


class Settings(pydantic.BaseModel):
    values: dict[str, int]


@pytest.mark.parametrize("codec", CODECS)
def test_order_is_kept(codec: CodecName) -> None:
    """A ranking stays one: also inside dataclasses and models."""
    ranking = {"zoe": 9, "ann": 1}
    for type_, value in (
        (dict[str, int], ranking),
        (Any, ranking),
        (Mapping[str, int], ranking),
        (dict[int, str], {2: "b", 1: "a"}),
    ):
        serializer: Serializer[Any] = Serializer(type_, codec)
        found = serializer.decode("k", serializer.encode("k", value))
        assert list(found.items()) == list(value.items())
    of_models: Serializer[Settings] = Serializer(Settings, codec)
    model = of_models.decode("k", of_models.encode("k", Settings(values=ranking)))
    assert list(model.values) == ["zoe", "ann"]


SAME: list[tuple[Any, Any, Any]] = [
    (dict[str, Any], {"a": 1, "b": {"x": 1, "y": 2}}, {"b": {"y": 2, "x": 1}, "a": 1}),
    (Movie, {"title": "M", "year": 1}, {"year": 1, "title": "M"}),
    (set[int], {1, 1000, 17}, {1000, 17, 1}),
    (set[int | str], {1, "a", "b"}, {"b", "a", 1}),
    (Settings, Settings(values={"a": 1, "b": 2}), Settings(values={"b": 2, "a": 1})),
]
OTHER: list[tuple[Any, Any, Any]] = [
    (Any, 1, True),
    (Any, 1, 1.0),
    (Any, [1.0], [1]),
    (Any, {"a": 0}, {"a": False}),
    (list[int], [1, 2], [2, 1]),
    (set[int], {1}, {2}),
    (Settings, Settings(values={"a": 1}), Settings(values={"a": 2})),
]


@pytest.mark.parametrize("codec", CODECS)
def test_equal_values_are_the_same(codec: CodecName) -> None:
    """compare_and_swap compares values: the order in which a dict or a set was filled is no
    difference, and a type is one."""
    for type_, one, other in SAME:
        serializer: Serializer[Any] = Serializer(type_, codec)
        assert serializer.same(serializer.encode("k", one), serializer.encode("k", other))
    for type_, one, other in OTHER:
        serializer = Serializer(type_, codec)
        assert not serializer.same(serializer.encode("k", one), serializer.encode("k", other))
        assert not serializer.same(serializer.encode("k", other), serializer.encode("k", one))


# -- the same value, of the same types


class Markup(str):
    __slots__ = ()


class Ratio(float):
    __slots__ = ()


class Word(enum.StrEnum):
    A = "a"


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Admin(User):
    level: int = 0


class Secret(pydantic.BaseModel):
    password: pydantic.SecretStr


class Aliased(pydantic.BaseModel):
    id: int = pydantic.Field(alias="_id")
    name: str = pydantic.Field(default="", validation_alias="n", serialization_alias="m")


class Hidden(pydantic.BaseModel):
    id: int
    hidden: int = pydantic.Field(default=0, exclude=True)


class More(Hidden):
    more: int = 1


class Computed(pydantic.BaseModel, extra="forbid"):
    a: int

    @pydantic.computed_field  # type: ignore[prop-decorator]  # as its documentation writes it
    @property
    def b(self) -> int:
        return self.a + 1


class Untyped(pydantic.BaseModel):
    value: Any


DAY = date(2024, 2, 29)
KEPT: list[tuple[Any, Any]] = [
    (dict[int, str], {2: "b", 1: "a"}),
    (dict[uuid.UUID, int], {uuid.UUID(int=2): 1}),
    (dict[date, int], {DAY: 1}),
    (dict[Variant, int], {Variant.RED: 1}),
    (dict[float, int], {1.5: 1}),
    (set[int | str], {1, "a"}),
    (frozenset[str], frozenset("ab")),
    (Mapping[str, int], {"b": 1, "a": 2}),
    (timedelta, timedelta(days=-1, microseconds=3)),
    (Word, Word.A),
    (dict[Word, Level], {Word.A: Level.LOW}),
    (Markup, Markup("<b>")),
    (dict[str, Markup], {"a": Markup("<b>")}),
    (Ratio, Ratio(1.5)),
    (OrderedDict, OrderedDict(b=1, a=[1, None])),
    (dict[str, Counter[str]], {"c": Counter("abca")}),
    (Aliased, Aliased.model_validate({"_id": 1, "n": "x"})),
    (list[Aliased], [Aliased.model_validate({"_id": 1})]),
    (Hidden, Hidden(id=1)),
    (Computed, Computed(a=1)),
    (Any, 2**53 + 1),
    (Any, -0.0),
]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("type_", "value"), KEPT)
def test_what_is_kept(type_: Any, value: Any, codec: CodecName) -> None:
    """What the codec can say comes back equal, of the same types, in the same order."""
    serializer: Serializer[Any] = Serializer(type_, codec)
    found = serializer.decode("k", serializer.encode("k", value))
    assert changed(value, found) is None
    assert type(found) is type(value)
    # A set has no order; of all else the text shows it, and tells -0.0 and nan.
    assert (found if isinstance(value, frozenset | set) else repr(found)) == (
        value if isinstance(value, frozenset | set) else repr(value)
    )


# The types that change, and where; None where that codec keeps the value.
REFUSED: list[tuple[Any, Any, str, str | None]] = [
    (float, math.nan, "a float that is not finite, which JSON does not have - at `$`", None),
    (float, math.inf, "a float that is not finite", None),
    (Any, {"a": [1, math.nan]}, r"not finite, which JSON does not have - at `$[...][1]`", None),
    (Any, {1: "a"}, "a key of type int would return as str - at `$`", None),
    (Any, b"x", "bytes would return as str", None),
    (dict[tuple[int, int], str], {(1, 2): "a"}, "objects of type tuple", None),
    (dict[bool, int], {True: 1}, "Expected `bool`", None),
    (Any, 2**70, "", "an integer beyond 64 bits"),
    (str, Markup("x"), "Markup would return as str", "Markup would return as str"),
    (str, Word.A, "Word would return as str", "Word would return as str"),
    (int, Level.LOW, "Level would return as int", "Level would return as int"),
    (float, Ratio(1), "Ratio would return as float", "Ratio would return as float"),
    (Any, {"a": [Markup("x")]}, "at `$[...][0]`", "at `$[...][0]`"),
    (Any, {Markup("x"): 1}, "a key of type Markup", "a key of type Markup"),
    (dict[str, int], defaultdict(int, a=1), "defaultdict would", "defaultdict would"),
    (OrderedDict, OrderedDict(a=Markup("x")), "at `$[...]`", "at `$[...]`"),
    (defaultdict, defaultdict(int, a=1), "at `$`", "at `$`"),
    (User, User(1, Markup("x")), "Markup would return as str", "at `$.name`"),
    (User, Admin(1, "x"), "Admin would return as User", "Admin would return as User"),
    (Movie, {"title": "M", "year": 1, "x": 2}, "a key would be lost", "a key would be lost"),
    (Any, NOW, "datetime would return as str", None),
    (Any, NOW.replace(tzinfo=None), "datetime would return as", "datetime would return as str"),
    (Any, {1, 2}, "set would return as list", "set would return as list"),
    (Any, Pair(1, "x"), "Pair would return as list", "Pair would return as list"),
    (Any, User(1, "x"), "User would return as dict", "User would return as dict"),
    (Any, Decimal("1.1"), "Decimal would return as str", "Decimal would return as str"),
    (Any, "\ud800", "a lone surrogate", "a lone surrogate"),
    (Any, LOOP, "part of itself", "part of itself"),
    (Secret, Secret(password="x"), "at `$.password`", "at `$.password`"),  # type: ignore[arg-type]  # pydantic makes a SecretStr of it
    (Hidden, Hidden(id=1, hidden=2), "at `$.hidden`", "at `$.hidden`"),
    (Hidden, More(id=1), "More would return as Hidden", "More would return as Hidden"),
    (list[Hidden], [More(id=1)], "at `$[0]`", "at `$[0]`"),
    (Untyped, Untyped(value=NOW), "at `$.value`", "at `$.value`"),
]


@pytest.mark.parametrize(("type_", "value", "in_json", "in_msgpack"), REFUSED)
def test_what_would_change(type_: Any, value: Any, in_json: str, in_msgpack: str | None) -> None:
    """What would come back as something else is not written: the message names the part, its type,
    and the codec that keeps it, if one does."""
    for codec, said_of, other in (
        ("json", in_json or None, None if in_msgpack else "msgpack"),
        ("msgpack", in_msgpack, None if in_json else "json"),
    ):
        serializer: Serializer[Any] = Serializer(type_, codec)  # type: ignore[arg-type]  # one of two
        if said_of is None:
            assert changed(value, serializer.decode("k", serializer.encode("k", value))) is None
            continue
        with pytest.raises(SerializationError, match=re.escape(said_of)) as caught:
            serializer.encode("k", value)
        assert (f"; codec={other!r} can" in str(caught.value)) is (other is not None)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None


def shape(value: Any) -> Any:
    """A value with the types of all its parts; a tuple as the list that it becomes."""
    if isinstance(value, dict):
        return type(value), [(shape(key), shape(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return list if type(value) is tuple else type(value), [shape(part) for part in value]
    return type(value), repr(value)


ODD = (
    JSON
    | st.floats()
    | st.integers()
    | st.binary(max_size=3)
    | st.dates()
    | st.sampled_from([Markup("m"), Word.A, Level.LOW, Ratio(1), NOW, Decimal(1), uuid.UUID(int=1)])
)
ANYTHING = st.recursive(
    ODD,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.sets(st.integers(0, 3) | st.sampled_from(["a", Word.A]), max_size=3)
        | st.dictionaries(
            st.text(max_size=2) | st.integers(0, 3) | st.just(Word.A), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("codec", CODECS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(value=ANYTHING)
def test_any_python_value(codec: CodecName, value: Any) -> None:
    """Whatever a value consists of: it comes back with all its types, or is refused."""
    serializer: Serializer[Any] = Serializer(Any, codec)
    try:
        raw = serializer.encode("k", value)
    except SerializationError:
        return
    assert shape(serializer.decode("k", raw)) == shape(value)


@dataclasses.dataclass
class Holder:
    made: Opaque


@pytest.mark.parametrize("codec", CODECS)
def test_no_other_class_is_called(codec: CodecName) -> None:
    """A class that is no subclass of a JSON type is not called with what stands in the table."""
    serializer: Serializer[Holder] = Serializer(Holder, codec)
    module: Any = msgspec.json if codec == "json" else msgspec.msgpack
    with pytest.raises(SerializationError, match=r"Expected `Opaque`, got `str` - at `\$.made`"):
        serializer.decode("k", module.encode({"made": SECRET}))
    with pytest.raises(SerializationError, match=r"Opaque is unsupported - at `\$.made`"):
        serializer.encode("k", Holder(Opaque()))


@pytest.mark.parametrize("codec", CODECS)
def test_the_two_changes_of_the_formats(codec: CodecName) -> None:
    """A tuple under Any is a list, and an int where the type says float is a float."""
    plain: Serializer[Any] = Serializer(Any, codec)
    assert plain.written("k", (1, ["a", (2,)]))[1] == [1, ["a", [2]]]
    of_floats: Serializer[list[float]] = Serializer(list[float], codec)
    assert list(map(type, of_floats.written("k", [1, 2])[1])) == [float, float]


# Annotation, values of it: what fields of generated models are made of.
FIELDS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers(-(2**63), 2**63 - 1)),
    (float, st.floats()),
    (str, st.text(st.characters(exclude_categories=["Cs"]), max_size=5)),
    (bool, st.booleans()),
    (Decimal, st.decimals(allow_nan=False, allow_infinity=False, places=3)),
    (datetime, st.datetimes(timezones=st.just(UTC))),
    (uuid.UUID, st.uuids()),
    (bytes, st.binary(max_size=4)),
    (Word | None, st.sampled_from([Word.A, None])),
    (set[int], st.sets(st.integers(-9, 9), max_size=4)),
    (tuple[int, str], st.tuples(st.integers(-9, 9), st.sampled_from("ab"))),
    (dict[int, float], st.dictionaries(st.integers(-9, 9), st.floats(), max_size=3)),
    (pydantic.SecretStr, st.builds(pydantic.SecretStr, st.sampled_from(["", "x"]))),
    (Hidden, st.sampled_from([Hidden(id=1), Hidden(id=1, hidden=2), More(id=1)])),
    (Aliased, st.just(Aliased.model_validate({"_id": 1}))),
    (Any, JSON | st.datetimes() | st.sampled_from([Word.A, Markup("m"), (1, 2), {1: 2}])),
]


@st.composite
def models(draw: st.DrawFn) -> pydantic.BaseModel:
    """A model with fields of any kind, some with an alias or left out of dumps, and one of it."""
    fields: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for index, (annotation, value) in enumerate(
        draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=4))
    ):
        options: dict[str, Any] = {"exclude": draw(st.sampled_from([None, None, None, True]))}
        name = given = f"f{index}"
        alias = draw(st.sampled_from(["", "alias", "validation_alias", "serialization_alias"]))
        if alias:
            options[alias] = f"{name}-alias"
            given = name if alias == "serialization_alias" else options[alias]
        fields[name] = (annotation, pydantic.Field(**options))
        values[given] = draw(value)
    made: Any = pydantic.create_model("Made", **fields)
    return made(**values)  # type: ignore[no-any-return]  # a model


@pytest.mark.parametrize("codec", CODECS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(model=models())
def test_generated_models(codec: CodecName, model: pydantic.BaseModel) -> None:
    """Whatever the fields of a pydantic model: what is written reads back equal, or is refused."""
    serializer: Serializer[Any] = Serializer(type(model), codec)
    try:
        raw = serializer.encode("k", model)
    except SerializationError:
        return
    found = serializer.decode("k", raw)
    assert type(found) is type(model)
    for name in type(model).model_fields:
        one, other = getattr(model, name), getattr(found, name)
        if isinstance(one, float | dict):
            assert repr(one) == repr(other)  # NaN is not equal to itself
        elif type(model).model_fields[name].annotation is not Any:
            assert (one, type(one)) == (other, type(other))
        else:
            assert changed(one, other) is None


# -- what does not fit

MISFITS: list[tuple[Any, Any, str]] = [
    (User, {"id": SECRET, "name": "x"}, "$.id"),
    (User, {"id": 1}, "$"),
    (User, {"id": 1, "name": "x", "tags": ["a", 7]}, "$.tags[1]"),
    (User, {"id": 1, "name": "x", "home": {"street": SECRET, "number": SECRET}}, "$.home.number"),
    (User, {"id": 1, "name": "x", "variant": SECRET}, "$.variant"),
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
