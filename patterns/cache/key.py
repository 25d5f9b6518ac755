"""The key of a cached call: canonical bytes of its bound arguments.

Every value is written with a tag for its type and, where its length varies, its length. So no two
different argument lists share an encoding, and an equal one has the same in every process: nothing
here depends on ``hash()``, ``repr()`` or the order of a dict or set. It knows no store.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from hashlib import blake2b
from pathlib import PurePath
from string import Formatter
from struct import pack
from typing import Any
from uuid import UUID

import msgspec

DEPTH_MAX = 64  # nested containers; a list that contains itself is refused by it


class Unencodable(Exception):  # noqa: N818  # says what the value is, and becomes a TypeError
    """A value has no stable encoding."""


def encode(value: Any, depth: int = DEPTH_MAX) -> bytes:
    """Return the canonical bytes of a value.

    ``1``, ``True``, ``1.0`` and ``"1"`` differ, as do ``0.0`` and ``-0.0``; every NaN is the same.

    Raises:
        Unencodable: its type (or that of something in it) has no stable encoding.
    """
    fast = _EXACT.get(type(value))
    if fast is not None:
        return fast(value)
    if depth <= 0:
        raise Unencodable(f"it is nested deeper than {DEPTH_MAX} levels, or contains itself")
    return _encode_other(value, depth - 1)


def _sized(tag: bytes, raw: bytes) -> bytes:
    return b"%b%d:%b" % (tag, len(raw), raw)


def _joined(tag: bytes, parts: list[bytes]) -> bytes:
    return b"%b%d:%b" % (tag, len(parts), b"".join(parts))


def _text(value: str) -> bytes:
    return _sized(b"s", value.encode("utf-8", "surrogatepass"))


def _float(value: float) -> bytes:
    return b"f" + (b"nan....." if math.isnan(value) else pack("!d", value))


def _decimal(value: Decimal) -> bytes:
    # 1.0 and 1.00 are equal but print differently, and a cached function may print.
    return _sized(b"D", str(value).encode())


def _moment(value: datetime) -> bytes:
    zone = "" if value.tzinfo is None else f"|{value.tzinfo!s}"
    return _sized(b"m", f"{value.isoformat()}|{value.fold}{zone}".encode())


def _duration(value: timedelta) -> bytes:
    return b"d%d;%d;%d;" % (value.days, value.seconds, value.microseconds)


_EXACT: dict[type, Callable[[Any], bytes]] = {
    int: lambda value: b"i%d;" % value,
    str: _text,
    bool: lambda value: b"T" if value else b"F",
    type(None): lambda _value: b"N",
    float: _float,
    bytes: lambda value: _sized(b"b", value),
    bytearray: lambda value: _sized(b"B", bytes(value)),
    complex: lambda value: b"c" + _float(value.real) + _float(value.imag),
    Decimal: _decimal,
    UUID: lambda value: b"U" + value.bytes,
    datetime: _moment,
    date: lambda value: _sized(b"a", value.isoformat().encode()),
    time: lambda value: _sized(b"h", f"{value.isoformat()}|{value.fold}".encode()),
    timedelta: _duration,
}


def _encode_other(value: Any, depth: int) -> bytes:
    kind = type(value)
    if kind is tuple or kind is list:
        tag = b"t" if kind is tuple else b"l"
        return _joined(tag, [encode(item, depth) for item in value])
    if kind is dict:
        pairs = [encode(key, depth) + encode(item, depth) for key, item in value.items()]
        return _joined(b"M", sorted(pairs))
    if kind is set or kind is frozenset:
        tag = b"S" if kind is set else b"Z"
        return _joined(tag, sorted(encode(item, depth) for item in value))
    own = getattr(kind, "__cache_key__", None)
    if own is not None:
        return _named(b"K", kind) + encode(own(value), depth)
    if isinstance(value, Enum):
        return _named(b"E", kind) + _text(value.name or repr(value.value))
    if isinstance(value, PurePath):
        return _sized(b"p", type(value).__name__.encode()) + _text(str(value))
    if isinstance(value, type):
        return _named(b"C", value)
    members = _members(value, kind)
    if members is not None:
        parts = [_text(name) + encode(item, depth) for name, item in members]
        return _named(b"O", kind) + _joined(b"o", parts)
    return _encode_subclass(value, kind, depth)


def _encode_subclass(value: Any, kind: type, depth: int) -> bytes:
    # A subclass of a plain type (a str with extra methods, a named tuple) counts by its class too.
    if isinstance(value, tuple):
        return _named(b"Y", kind) + encode(tuple(value), depth)
    for base in (int, str, float, bytes):
        if isinstance(value, base):
            plain: Any = base
            return _named(b"Y", kind) + _EXACT[base](plain(value))
    raise Unencodable(f"a {_name(kind)} has no stable encoding")


def _members(value: Any, kind: type) -> list[tuple[str, Any]] | None:
    """Names and values of what makes up a dataclass, msgspec struct or pydantic model."""
    if is_dataclass(value):
        return [(each.name, getattr(value, each.name)) for each in fields(value) if _compares(each)]
    if isinstance(value, msgspec.Struct):
        return [(name, getattr(value, name)) for name in kind.__struct_fields__]  # type: ignore[attr-defined]  # every Struct has it
    pydantic = sys.modules.get("pydantic")  # whoever holds a model has imported it
    if pydantic is not None and isinstance(value, pydantic.BaseModel):
        extra = value.__pydantic_extra__ or {}
        return [(name, getattr(value, name)) for name in kind.model_fields] + sorted(extra.items())  # type: ignore[attr-defined]  # every model has it
    return None


def _compares(each: Any) -> bool:
    # field(compare=False) says of itself that it is no part of the value.
    return bool(each.compare)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _named(tag: bytes, kind: type) -> bytes:
    return _sized(tag, _name(kind).encode())


# -- binding -------------------------------------------------------------------------------


class Binder:
    """Makes keys of the calls of one function.

    ``f(1)``, ``f(a=1)`` and ``f()`` with the default 1 are the same call.

    Args:
        fn: the function.
        name: distinguishes it from every other function; part of each key.
        ignore: parameters that do not count.
        key: maps what `ignore` leaves of the arguments to what is encoded in their place.
        tags: templates, such as ``"user:{user_id}"``, filled in with the arguments.

    Raises:
        TypeError: `ignore` or a template names a parameter that does not exist (or is ignored).
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str,
        ignore: tuple[str, ...],
        key: Callable[..., Any] | None,
        tags: tuple[str, ...],
    ) -> None:
        self.signature: inspect.Signature = inspect.signature(fn)
        self.name = name
        self._ignore = frozenset(ignore)
        self._key = key
        self._tags = tags
        self.has_tags: bool = bool(tags)
        self._what = f"cached {fn.__qualname__}()"
        parameters = self.signature.parameters
        for each in ignore:
            if each not in parameters:
                raise TypeError(f"{self._what}: ignore names {each!r}, which is no parameter of it")
        self._check_tags(parameters.keys() - self._ignore)
        # The part of the signature that helpers such as invalidate() need: ignored parameters may
        # be left out.
        self._lenient = self.signature.replace(
            parameters=[
                each.replace(default=None)
                if each.name in self._ignore and each.default is each.empty and _has_default(each)
                else each
                for each in _defaults_last(list(parameters.values()), self._ignore)
            ]
        )
        self._plain = self._plain_names()
        self._defaults = tuple(
            each.default for each in parameters.values() if each.default is not each.empty
        )
        self._labels = {each: _text(each) for each in parameters}

    def _check_tags(self, known: set[str]) -> None:
        for template in self._tags:
            try:
                parts = list(Formatter().parse(template))
            except ValueError as error:
                raise TypeError(
                    f"{self._what}: the tag {template!r} is no template: {error}"
                ) from None
            for _, field, _, _ in parts:
                if field is None:
                    continue
                first = field.split(".")[0].split("[")[0]
                if first not in known:
                    raise TypeError(
                        f"{self._what}: the tag {template!r} names {first or '{}'!r}; it can name "
                        "the parameters that are not ignored: "
                        + (", ".join(sorted(known)) or "none")
                    )

    def _plain_names(self) -> tuple[str, ...] | None:
        """The parameters' names, where a call by position alone needs no binding."""
        parameters = self.signature.parameters.values()
        kinds = {each.kind for each in parameters}
        if kinds <= {
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        }:
            return tuple(each.name for each in parameters)
        return None

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, lenient: bool = False
    ) -> dict[str, Any]:
        """Return the arguments by parameter, defaults filled in.

        Raises:
            TypeError: they do not fit the function.
        """
        plain = self._plain
        if plain is not None and not kwargs:
            # The usual call: inspect's own binding costs ten times as much.
            missing = len(plain) - len(args)
            if not missing:
                return dict(zip(plain, args, strict=True))
            if 0 < missing <= len(self._defaults) and not (lenient and self._ignore):
                return dict(zip(plain, args + self._defaults[-missing:], strict=True))
        if lenient and self._ignore:
            # First as if the ignored parameters did not exist, then as the function is called.
            try:
                bound = self._lenient.bind(*args, **kwargs)
            except TypeError:
                bound = self.signature.bind(*args, **kwargs)
        else:
            bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def digest(self, arguments: dict[str, Any]) -> str:
        """Return the 160-bit digest of what counts of the arguments.

        Raises:
            TypeError: one has no stable encoding; names the parameter and the ways out.
        """
        if self._key is not None:
            counted = self._encode("key=", self._key_value(arguments))
        else:
            parts = []
            for name, value in arguments.items():
                if name not in self._ignore:
                    parts.append(self._labels[name])
                    parts.append(self._encode(name, value))
            counted = b"".join(parts)
        return blake2b(counted, digest_size=20).hexdigest()

    def _key_value(self, arguments: dict[str, Any]) -> Any:
        assert self._key is not None
        bound = inspect.BoundArguments(
            self.signature,
            {name: arguments[name] for name in arguments if name not in self._ignore},
        )
        return self._key(*bound.args, **bound.kwargs)

    def _encode(self, name: str, value: Any) -> bytes:
        fast = _EXACT.get(type(value))
        if fast is not None:
            return fast(value)
        try:
            return encode(value)
        except Unencodable as why:
            reason = str(why)
        if name == "key=":
            raise TypeError(f"{self._what}: what key= returned cannot be part of a key: {reason}")
        raise TypeError(
            f"{self._what}: the parameter {name!r} cannot be part of the key: {reason}. "
            f"Leave it out with ignore=({name!r},), say what counts with key=, or give its class "
            "a __cache_key__() method"
        )

    def tags(self, arguments: dict[str, Any]) -> tuple[str, ...]:
        """Return the call's tags."""
        return tuple(template.format_map(arguments) for template in self._tags)


def _has_default(each: inspect.Parameter) -> bool:
    return each.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _defaults_last(
    parameters: list[inspect.Parameter], ignored: frozenset[str]
) -> list[inspect.Parameter]:
    """Ignored parameters go behind the others of their kind, where a default may stand."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = [each for each in parameters if each.kind in positional]
    rest = [each for each in parameters if each.kind not in positional]
    late = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for each in first
        if each.name in ignored and each.kind is not inspect.Parameter.POSITIONAL_ONLY
    ]
    kept = [each for each in first if each.name not in ignored]
    spread = [each for each in rest if each.kind is inspect.Parameter.VAR_POSITIONAL]
    after = [each for each in rest if each.kind is inspect.Parameter.KEYWORD_ONLY]
    last = [each for each in rest if each.kind is inspect.Parameter.VAR_KEYWORD]
    return [*kept, *spread, *late, *after, *last]
