"""Typed values to bytes and back, on msgspec (and pydantic's own code for pydantic's models).

Decoding checks that the bytes fit the type completely. What does not fit is a SerializationError
that names the path inside the value, and never quotes the data.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeAlias, TypeVar, get_args, get_origin

import msgspec

from ..errors import ConfigError, SerializationError

T = TypeVar("T")

CodecName: TypeAlias = Literal["json", "msgpack"]

# "Expected `int`, got `str` - at `$.age`" speaks of types only; other messages may quote a value.
_PATH = re.compile(r" - at `(\$[^`]*)`$")
_OF_TYPES = ("Expected `", "Object missing required field", "Encoding objects of type")
_PLAIN = (dict, list, str, int, float, bool, type(None))  # what decoding makes of itself
_UNKNOWN_FIELD = "Object contains unknown field"


class Serializer(Generic[T]):
    """One type's values as bytes.

    Args:
        type_: what msgspec can decode (dataclass, TypedDict, Struct, JSON types), or a pydantic
            model.
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
        self.name = type_.__name__ if isinstance(type_, type) else str(type_)
        # Deterministic: equal values have equal bytes, which compare_and_swap relies on.
        encoder: Any = (
            msgspec.json.Encoder(order="deterministic")
            if codec == "json"
            else msgspec.msgpack.Encoder(order="deterministic")
        )
        self._encode: Callable[[Any], bytes] = encoder.encode
        self._names: Callable[[], set[str]] = set  # what a pydantic path may say
        self._decode: Callable[[bytes], Any]
        if _is_pydantic(type_):
            self._use_pydantic(type_, codec)
            return
        try:
            if (unknown := _unknown(type_)) is not None:
                raise TypeError(f"{codec} has no way to write {unknown} and read it back")
            decoder: Any = (
                msgspec.json.Decoder(type_) if codec == "json" else msgspec.msgpack.Decoder(type_)
            )
        except (TypeError, NameError) as error:
            raise ConfigError(f"values of type {self.name} cannot be kept: {error}") from None
        self._decode = decoder.decode

    def _use_pydantic(self, type_: Any, codec: CodecName) -> None:
        from pydantic import TypeAdapter

        adapter = TypeAdapter(type_)
        pack = self._encode
        # Through our encoder, for pydantic's own keeps the order in which a dict was filled; and a
        # value that does not fit its model is an error, where pydantic would only warn.
        self._encode = lambda value: pack(adapter.dump_python(value, mode="json", warnings="error"))
        if codec == "json":
            self._decode = adapter.validate_json
        else:
            unpack = msgspec.msgpack.Decoder().decode
            self._decode = lambda raw: adapter.validate_python(unpack(raw))
        self._names = lambda: _names_in(adapter.json_schema())

    def encode(self, key: str, value: T) -> bytes:
        """Return the value's bytes.

        Raises:
            SerializationError: it holds something that the codec cannot express.
        """
        try:
            return self._encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            why = _path_and_reason(error, self._names)
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
        except (ValueError, RecursionError) as error:  # msgspec's and pydantic's are ValueErrors
            why = _path_and_reason(error, self._names)
        raise SerializationError(f"the value of {key!r} is no {self.name} in {self.codec}{why}")


def _path_and_reason(error: Exception, names: Callable[[], set[str]]) -> str:
    """Where, and of which types, without a word of the data."""
    if hasattr(error, "errors") and callable(error.errors):  # pydantic
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = "".join(_part(part, names) for part in first["loc"])
        return f": {first['type']} - at `${path}`"
    text = str(error)
    found = _PATH.search(text)
    path = found[1] if found else "$"
    reason = _PATH.sub("", text)
    said = reason if reason.startswith(_OF_TYPES) else type(error).__name__
    if reason.startswith(_UNKNOWN_FIELD):
        said = "Object contains an unknown field"  # its name is data
    return f": {said} - at `{path}`"


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
    """The name of a class that msgspec leaves to others, unless plain values are of it too."""
    info = msgspec.inspect.type_info(type_)
    if isinstance(info, msgspec.inspect.CustomType):
        fits = any(issubclass(plain, info.cls) for plain in _PLAIN)
        return None if fits else info.cls.__name__
    # The arguments of Literal and Annotated are no types, but for the first of these.
    parts = (part for part in get_args(type_) if isinstance(part, type) or get_origin(part))
    return next((name for part in parts if (name := _unknown(part))), None)


def _is_pydantic(type_: Any) -> bool:
    pydantic = sys.modules.get("pydantic")  # whoever holds a model has imported it
    if pydantic is None:
        return False
    if isinstance(type_, type) and issubclass(type_, pydantic.BaseModel):
        return True
    return any(_is_pydantic(part) for part in get_args(type_))
