"""Typed values to bytes and back, on msgspec (and pydantic's own code for pydantic's models).

One rule holds for every codec: **what is written reads back as the same value, of the same types**.
Each value is read back before it is sent, and refused where a part would change: a `Markup` that
would return as a str, a `datetime` under ``Any``, a NaN in JSON, a field that pydantic leaves out.
Two changes are part of the formats and allowed: a tuple under ``Any`` returns as a list, and an int
where the type says float returns as a float.

Decoding checks that the bytes fit the type completely. What does not fit is a SerializationError
that names the path inside the value, and never quotes the data.
"""

from __future__ import annotations

import enum
import marshal
import math
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from operator import attrgetter
from typing import Any, Generic, Literal, TypeAlias, TypeVar, get_args, get_origin
from uuid import UUID

import msgspec

from ..errors import ConfigError, SerializationError

T = TypeVar("T")

CodecName: TypeAlias = Literal["json", "msgpack"]

# The types of values that JSON holds as they are (a tuple returns as a list). Compare with
# `type(value) in JSON_TYPES`: a subclass would lose its type.
JSON_TYPES = frozenset((dict, list, tuple, str, int, float, bool, type(None)))

# "Expected `int`, got `str` - at `$.age`" speaks of types only; other messages may quote a value.
_PATH = re.compile(r" - at (?:`key` in )?`(\$[^`]*)`$")
_OF_TYPES = (
    "Expected `",
    "Object missing required field",
    "Encoding objects of type",
    "Only dicts",
)
_PLAIN = (dict, list, str, int, float, bool, type(None))  # what decoding makes of itself
_MADE_FROM = (str, int, float, dict, list)  # whose subclasses are made by calling them
_UNKNOWN_FIELD = "Object contains unknown field"
# Values without parts, compared by type and equality.
_LEAVES = frozenset(
    (str, int, float, bool, type(None), bytes, datetime, date, time, timedelta, Decimal, UUID)
)

_BUILTINS = JSON_TYPES | {bytes, set, frozenset}  # marshal writes them
_BY_IDENTITY: Any = object.__eq__


class Serializer(Generic[T]):
    """One type's values as bytes.

    Args:
        type_: what msgspec can decode (dataclass, TypedDict, Struct, JSON types), a subclass of a
            JSON type that is made from a value of it, or a pydantic model.
        codec: ``"json"`` or ``"msgpack"``.

    Raises:
        ConfigError: another codec, or a type that cannot be decoded.
    """

    def __init__(self, type_: Any, codec: CodecName) -> None:
        if codec not in ("json", "msgpack"):
            raise ConfigError(f"codec must be 'json' or 'msgpack', not {codec!r}")
        self.type = type_
        self.codec = codec
        # Of list[User] the class is list alone.
        self.name: str = type_.__name__ if isinstance(type_, type) else str(type_)
        module: Any = msgspec.json if codec == "json" else msgspec.msgpack
        self._encode: Callable[[Any], bytes] = module.Encoder(enc_hook=_plain_of).encode
        self._names: Callable[[], set[str]] = set  # what a pydantic path may say
        self._decode: Callable[[bytes], Any]
        if _is_pydantic(type_):
            self._use_pydantic(type_, codec)
            return
        try:
            if (unknown := _unknown(type_)) is not None:
                raise TypeError(f"{codec} has no way to write {unknown} and read it back")
            self._decode = module.Decoder(type_, dec_hook=_of_class).decode
        except (TypeError, NameError) as error:
            raise ConfigError(f"values of type {self.name} cannot be kept: {error}") from None

    def _use_pydantic(self, type_: Any, codec: CodecName) -> None:
        import pydantic

        adapter = pydantic.TypeAdapter(type_)
        pack = self._encode
        # A value that does not fit its model is an error, where pydantic would only warn.
        self._encode = lambda value: pack(
            adapter.dump_python(value, mode="json", round_trip=True, warnings="error")
        )
        # Fields are written by their names, whatever their aliases; either is read.
        newer = tuple(map(int, pydantic.VERSION.split(".")[:2])) >= (2, 11)
        names: dict[str, Any] = {"by_name": True, "by_alias": True} if newer else {}
        if codec == "json":
            self._decode = lambda raw: adapter.validate_json(raw, **names)
        else:
            unpack = msgspec.msgpack.Decoder().decode
            self._decode = lambda raw: adapter.validate_python(unpack(raw), **names)
        self._names = lambda: _names_in(adapter.json_schema())

    def encode(self, key: str, value: T) -> bytes:
        """Return the value's bytes.

        Raises:
            SerializationError: they would not read back as the same value; names the part.
        """
        return self.written(key, value)[0]

    def written(self, key: str, value: T) -> tuple[bytes, T]:
        """Return the value's bytes, and the value that they read back as."""
        done, why = self._attempt(value)
        if done is not None:
            return done
        other: CodecName = "msgpack" if self.codec == "json" else "json"
        if self._fits(other, value):
            why += f"; codec={other!r} can"
        raise SerializationError(
            f"{key!r}: a value of type {type(value).__name__} cannot be written as {self.codec}{why}"
        )

    def decode(self, key: str, raw: bytes) -> T:
        """Return the value in the bytes.

        Raises:
            SerializationError: they are damaged, or do not fit the type.
        """
        try:
            return self._decode(raw)  # type: ignore[no-any-return]  # the decoder was made for T
        except (TypeError, ValueError, RecursionError) as error:  # msgspec's and pydantic's too
            why = _path_and_reason(error, self._names)
        raise SerializationError(f"the value of {key!r} is no {self.name} in {self.codec}{why}")

    def same(self, raw: bytes, other: bytes) -> bool:
        """Tell whether two byte strings that this type accepts hold equal values. The order in which
        a dict or a set was filled does not matter."""
        if raw == other:
            return True
        try:
            one, two = self._decode(raw), self._decode(other)
            return changed(one, two) is None and changed(two, one) is None
        except (TypeError, ValueError, RecursionError):
            return False

    def _attempt(self, value: T) -> tuple[tuple[bytes, T] | None, str]:
        """The bytes and what they read back as; or None, and why there are none."""
        try:
            raw = self._encode(value)
            back = self._decode(raw)
            what = changed(value, back)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            return None, self._infinite(value) or self._why_not_written(value, error)
        if what is None:
            return (raw, back), ""
        return None, self._infinite(value) or f": {what}"

    def _why_not_written(self, value: Any, error: Exception) -> str:
        if isinstance(error, msgspec.ValidationError | RecursionError) or hasattr(error, "errors"):
            return _path_and_reason(error, self._names)
        # msgspec does not say which part it could not write: the innermost that it refuses.
        path = "$"
        for _ in range(100):
            for step, part in _parts(value):
                try:
                    self._encode(part)
                except (TypeError, ValueError, OverflowError) as inner:
                    value, error, path = part, inner, path + step
                    break
            else:
                break
        return f": {_reason(error)} - at `{path}`"

    def _infinite(self, value: Any) -> str:
        if self.codec != "json" or (path := _path_to_infinite(value)) is None:
            return ""
        return f": a float that is not finite, which JSON does not have - at `${path}`"

    def _fits(self, codec: CodecName, value: T) -> bool:
        try:
            other: Serializer[T] = Serializer(self.type, codec)
        except ConfigError:
            return False
        return other._attempt(value)[0] is not None


# -- what is read back ---------------------------------------------------------------------


def changed(value: object, back: object) -> str | None:
    """Say which part of `value` is not the same in `back`, what was read back; None when all are.

    The text names types and the path, never the data. A tuple may have become a list, and an int a
    float.
    """
    if type(value) in _BUILTINS and _are_plain_and_same(value, back):
        return None
    found = _difference(value, back)
    return None if found is None else f"{found[1]} - at `${found[0]}`"


def _are_plain_and_same(value: Any, back: Any) -> bool:
    """Whether both are made of exact builtin types, and equal: at the speed of C. marshal refuses
    any subclass, and its version 2 writes nothing but types and values."""
    try:
        return marshal.dumps(value, 2) == marshal.dumps(back, 2)
    except ValueError:
        return False


def _difference(value: Any, back: Any) -> tuple[str, str] | None:
    kind = type(value)
    if kind in _LEAVES:
        if type(back) is kind or (kind is int and type(back) is float):
            return None if value == back or _both_nan(value, back) else _other_value(kind)
        return _other_type(kind, back)
    # Not by `is`: frozen clocks replace datetime by a lookalike.
    if not isinstance(back, kind) and not (kind is tuple and type(back) is list):
        return _other_type(kind, back)
    if isinstance(value, dict):
        return _dict_difference(value, back)
    if isinstance(value, list) or kind is tuple:
        return _items_difference(value, back)
    if kind is set or kind is frozenset:
        kept = {(type(each), each) for each in value} == {(type(each), each) for each in back}
        return None if kept else _other_value(kind)
    names, parts_of, compares = _shapes.get(kind) or _shape_of(kind)
    if not _have_the_same_plain_parts(value, back, parts_of):
        for name in names:
            part = getattr(value, name, None)
            found = _difference(part, getattr(back, name, None))
            if found is not None:
                return f".{name}{found[0]}", found[1]
    if compares and kind.__eq__ is not _BY_IDENTITY and value != back:
        return _other_value(kind)
    return None


def _have_the_same_plain_parts(value: Any, back: Any, parts_of: Any) -> bool:
    try:
        return _are_plain_and_same(parts_of(value), parts_of(back))
    except AttributeError:
        return False


# What objects of a class consist of: the names, what gets all of them, and whether they have more
# that only their own comparison tells.
_Shape: TypeAlias = tuple[Sequence[str], Callable[[Any], object], bool]
_shapes: weakref.WeakKeyDictionary[type, _Shape] = weakref.WeakKeyDictionary()


def _shape_of(kind: type) -> _Shape:
    names = _fields_of(kind)
    get: Callable[[Any], object] = attrgetter(*names) if names else lambda _: ()
    shape = _shapes[kind] = (names or (), get, names is None or hasattr(kind, "model_fields"))
    return shape


def _items_difference(value: Any, back: list[Any]) -> tuple[str, str] | None:
    if len(value) != len(back):
        return _other_value(type(value))
    # At once where no item has parts.
    kinds = list(map(type, value))
    if _LEAVES.issuperset(kinds) and kinds == list(map(type, back)) and list(value) == list(back):
        return None
    for index, part in enumerate(value):
        found = _difference(part, back[index])
        if found is not None:
            return f"[{index}]{found[0]}", found[1]
    return None


def _dict_difference(value: dict[Any, Any], back: dict[Any, Any]) -> tuple[str, str] | None:
    same_keys = list(map(type, value)) == list(map(type, back))
    kinds = list(map(type, value.values()))
    if (
        same_keys
        and _LEAVES.issuperset(kinds)
        and kinds == list(map(type, back.values()))
        and value == back
    ):
        return None
    keys = back if same_keys else {key: key for key in back}
    for key, part in value.items():
        if key not in back:
            lost = next((each for each in back if type(each) is not type(key)), None)
            if len(back) == len(value) and lost is not None:
                return "", f"a key of type {type(key).__name__} would return as {_named(lost)}"
            return "", "a key would be lost"
        if keys is not back and not isinstance(keys[key], type(key)):
            return "", f"a key of type {type(key).__name__} would return as {_named(keys[key])}"
        found = _difference(part, back[key])
        if found is not None:
            return f"[...]{found[0]}", found[1]
    return None if len(value) == len(back) else ("", "a key would be added")


def _other_type(kind: type, back: object) -> tuple[str, str]:
    return "", f"{kind.__name__} would return as {_named(back)}, unless that type is declared"


def _other_value(kind: type) -> tuple[str, str]:
    return "", f"{kind.__name__} would return with another value"


def _named(back: object) -> str:
    return type(back).__name__


def _both_nan(value: Any, back: Any) -> bool:
    return bool(value != value and back != back)  # noqa: PLR0124  # what only NaN does


def _fields_of(kind: type) -> list[str] | None:
    """The names of what an object of that class consists of; None where nothing says."""
    if (fields := getattr(kind, "__dataclass_fields__", None)) is not None:
        return [name for name, field in fields.items() if field.compare]
    for attribute in ("__struct_fields__", "model_fields", "_fields"):
        if (names := getattr(kind, attribute, None)) is not None:
            return list(names)
    if (attributes := getattr(kind, "__attrs_attrs__", None)) is not None:
        return [each.name for each in attributes]
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value, each with its step of the path."""
    if isinstance(value, dict):
        yield from (("[...]", part) for part in (*value, *value.values()))
    elif isinstance(value, list | tuple | set | frozenset) and not hasattr(value, "_fields"):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif not isinstance(value, enum.Enum):
        names = _fields_of(type(value)) or ()
        yield from ((f".{name}", getattr(value, name, None)) for name in names)


def _path_to_infinite(value: Any, depth: int = 100) -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    for step, part in _parts(value) if depth else ():
        if (path := _path_to_infinite(part, depth - 1)) is not None:
            return step + path
    return None


def _plain_of(value: Any) -> Any:
    """The plain value in one of a subclass, which msgspec would refuse to write."""
    for kind in (str, int, float):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


def _of_class(declared: Any, value: Any) -> Any:
    """Make a value of a subclass of a JSON type: what its declared type says it was. No other class
    is called with what was read."""
    class_ = get_origin(declared) or declared
    if isinstance(value, class_):
        return value
    if issubclass(class_, _MADE_FROM):
        return class_(value)
    raise TypeError(f"Expected `{class_.__name__}`, got `{type(value).__name__}`")


# -- messages and types --------------------------------------------------------------------


def _path_and_reason(error: Exception, names: Callable[[], set[str]]) -> str:
    """The path and the types of an error, without any of the data."""
    if hasattr(error, "errors") and callable(error.errors):  # pydantic
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = "".join(_part(part, names) for part in first["loc"])
        return f": {first['type']} - at `${path}`"
    found = _PATH.search(str(error))
    return f": {_reason(error)} - at `{found[1] if found else '$'}`"


def _reason(error: Exception) -> str:
    reason = _PATH.sub("", str(error))
    if reason.startswith(_UNKNOWN_FIELD):
        return "Object contains an unknown field"  # its name is data
    if isinstance(error, RecursionError):
        return "nested too deeply, or part of itself"
    if isinstance(error, UnicodeEncodeError):
        return "a lone surrogate, which UTF-8 cannot express"
    if isinstance(error, OverflowError):
        return "an integer beyond 64 bits"
    return reason if reason.startswith(_OF_TYPES) else type(error).__name__


def _part(part: int | str, names: Callable[[], set[str]]) -> str:
    """A step of pydantic's path. The keys of a dict are data; msgspec writes them the same way."""
    if isinstance(part, int):
        return f"[{part}]"
    try:
        known = part in names()
    except Exception:  # noqa: BLE001  # a model may have no schema
        known = False
    return f".{part}" if known else "[...]"


def _names_in(schema: Any) -> set[str]:
    """The names of fields and types in a JSON schema."""
    if isinstance(schema, list):
        return set().union(*map(_names_in, schema))
    if not isinstance(schema, dict):
        return set()
    found = set(schema.get("properties") or ()) | set(schema.get("$defs") or ())
    return found.union(*map(_names_in, schema.values()))


def _unknown(type_: Any) -> str | None:
    """The name of a class that msgspec cannot write and read: not one of plain values or made of one."""
    info = msgspec.inspect.type_info(type_)
    if isinstance(info, msgspec.inspect.CustomType):
        class_: type = get_origin(info.cls) or info.cls
        fits = any(issubclass(plain, class_) for plain in _PLAIN)
        return None if fits or issubclass(class_, _MADE_FROM) else class_.__name__
    # The arguments of Literal and Annotated are no types, but for the first of these.
    parts = (part for part in get_args(type_) if isinstance(part, type) or get_origin(part))
    return next((name for part in parts if (name := _unknown(part))), None)


def _is_pydantic(type_: Any) -> bool:
    pydantic = sys.modules.get("pydantic")  # imported by the module of any model
    if pydantic is None:
        return False
    if isinstance(type_, type) and issubclass(type_, pydantic.BaseModel):
        return True
    return any(_is_pydantic(part) for part in get_args(type_))
