"""The key of a cached call: canonical bytes of its bound arguments.

Every value is written with a tag for its type and, where its length varies, its length. So no two
different argument lists share an encoding, and equal lists have the same one in every process:
nothing here depends on ``hash()``, ``repr()`` or the order of a dict or set. Classes and functions
count by their names, and one name stands for one of them. This module knows no store.
"""

from __future__ import annotations

import functools
import gc
import inspect
import ipaddress
import math
import sys
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag
from fractions import Fraction
from hashlib import blake2b
from pathlib import PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from string import Formatter
from struct import pack
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec

from ..._fork import new_lock

DEPTH_MAX = 64  # nested containers; a list that contains itself is refused by it


class Unencodable(Exception):  # noqa: N818  # says what the value is, and becomes a TypeError
    """A value has no stable encoding."""


def encode(value: Any, depth: int = DEPTH_MAX) -> bytes:
    """Return the canonical bytes of a value.

    ``1``, ``True``, ``1.0`` and ``"1"`` differ, as do ``0.0`` and ``-0.0``; every NaN is the same.

    Raises:
        Unencodable: its type (or that of something in it) has no stable encoding.
    """
    kind = type(value)
    fast = _EXACT.get(kind)
    if fast is not None:
        return fast(value)
    if depth <= 0:
        raise Unencodable(f"it is nested deeper than {DEPTH_MAX} levels, or contains itself")
    encoder = _CONTAINERS.get(kind) or _encoders.get(kind) or _encoder_of(kind)
    return encoder(value, depth - 1)


def _sized(tag: bytes, raw: bytes) -> bytes:
    return b"%b%d:%b" % (tag, len(raw), raw)


def _joined(tag: bytes, parts: list[bytes]) -> bytes:
    return b"%b%d:%b" % (tag, len(parts), b"".join(parts))


def _text(value: str) -> bytes:
    return _sized(b"s", value.encode("utf-8", "surrogatepass"))


# -- plain values --------------------------------------------------------------------------

# Subclasses come here too, so every conversion is that of the plain type: a subclass may override
# __str__, __int__ or isoformat().


def _int(value: int) -> bytes:
    return b"i%d;" % int.__index__(value)


def _float(value: float) -> bytes:
    number = float.__float__(value)
    return b"f" + pack("!d", math.nan if math.isnan(number) else number)


def _complex(value: complex) -> bytes:
    number = complex.__complex__(value)
    return b"c" + _float(number.real) + _float(number.imag)


def _decimal(value: Decimal) -> bytes:
    # 1.0 and 1.00 are equal but print differently, and a cached function may print.
    return _sized(b"D", Decimal.__str__(value).encode())


def _moment(value: datetime) -> bytes:
    text = f"{datetime.isoformat(value)}|{value.fold}"
    return _sized(b"m", text.encode()) + _zone(value.tzinfo)


def _date(value: date) -> bytes:
    return _sized(b"a", date.isoformat(value).encode())


def _time(value: time) -> bytes:
    # A time has no offset where that depends on the day: its zone is all there is.
    return _sized(b"h", f"{time.isoformat(value)}|{value.fold}".encode()) + _zone(value.tzinfo)


def _zone(zone: Any) -> bytes:
    kind: Any = type(zone)
    if zone is None:
        return b"N"
    if kind is timezone:
        return _sized(b"z", str(zone).encode()) + _duration(zone.utcoffset(None))
    if isinstance(zone, ZoneInfo):
        if zone.key is None:
            raise Unencodable("a ZoneInfo without a key has no stable encoding")
        return _named(b"Y", kind) + _text(zone.key)
    if kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__:
        raise Unencodable(f"a time zone of type {_name(kind)} does not say which one it is")
    return _named(b"Y", kind) + _text(str(zone))


def _duration(value: timedelta) -> bytes:
    return b"d%d;%d;%d;" % (value.days, value.seconds, value.microseconds)


def _range(value: range) -> bytes:
    return b"r%d;%d;%d;" % (value.start, value.stop, value.step)


def _by_text(value: object) -> bytes:
    # Of these standard classes the name and the text say all, in every version of Python.
    return _sized(b"p", type(value).__name__.encode()) + _text(str(value))


_EXACT: dict[type, Callable[[Any], bytes]] = {
    int: lambda value: b"i%d;" % value,
    str: _text,
    bool: lambda value: b"T" if value else b"F",
    type(None): lambda _value: b"N",
    type(...): lambda _value: b"e",
    float: _float,
    bytes: lambda value: _sized(b"b", value),
    bytearray: lambda value: _sized(b"B", bytes(value)),
    complex: _complex,
    Decimal: _decimal,
    UUID: lambda value: b"U" + value.bytes,
    datetime: _moment,
    date: _date,
    time: _time,
    timedelta: _duration,
    timezone: _zone,
    ZoneInfo: _zone,
    range: _range,
}
_EXACT |= dict.fromkeys(
    (
        PosixPath, PurePosixPath, WindowsPath, PureWindowsPath, Fraction,
        ipaddress.IPv4Address, ipaddress.IPv4Network, ipaddress.IPv4Interface,
        ipaddress.IPv6Address, ipaddress.IPv6Network, ipaddress.IPv6Interface,
    ),
    _by_text,
)  # fmt: skip


PLAIN_TYPES = frozenset(_EXACT)  # values without parts, all of them immutable but bytearray


# -- containers, objects, classes ----------------------------------------------------------

Encoder: TypeAlias = Callable[[Any, int], bytes]  # of a value and the depth that is left


def _members(tag: bytes, items: Iterable[Any], depth: int) -> bytes:
    return _joined(tag, sorted([encode(each, depth) for each in items]))


def _dict(value: dict[Any, Any], depth: int) -> bytes:
    pairs = dict.items(value)
    return _joined(b"M", sorted([encode(key, depth) + encode(item, depth) for key, item in pairs]))


def _partial(value: functools.partial[Any], depth: int) -> bytes:
    parts = (value.func, value.args, value.keywords, value.__dict__)
    return b"P" + b"".join(encode(each, depth) for each in parts)


_CONTAINERS: dict[type, Encoder] = {
    tuple: lambda value, depth: _joined(
        b"t", [encode(each, depth) for each in tuple.__iter__(value)]
    ),
    list: lambda value, depth: _joined(
        b"l", [encode(each, depth) for each in list.__iter__(value)]
    ),
    set: lambda value, depth: _members(b"S", set.__iter__(value), depth),
    frozenset: lambda value, depth: _members(b"Z", frozenset.__iter__(value), depth),
    # Unlike two dicts, two of them with another order are not equal.
    OrderedDict: lambda value, depth: _joined(
        b"Q", [encode(each, depth) for each in OrderedDict.items(value)]
    ),
    defaultdict: lambda value, depth: (
        b"G" + encode(value.default_factory, depth) + _dict(value, depth)
    ),
    dict: _dict,
    functools.partial: _partial,
    MethodType: lambda value, depth: (
        b"W" + encode(value.__self__, depth) + encode(value.__func__, depth)
    ),
}

# What a subclass may be built on; the narrower class first.
_BASES: dict[type, Encoder] = {
    int: lambda value, _depth: _int(value),
    str: lambda value, _depth: _text(str.__str__(value)),
    float: lambda value, _depth: _float(value),
    bytes: lambda value, _depth: _sized(b"b", bytes.__getitem__(value, slice(None))),
    bytearray: lambda value, _depth: _sized(b"B", bytes(bytearray.__getitem__(value, slice(None)))),
    complex: lambda value, _depth: _complex(value),
    Decimal: lambda value, _depth: _decimal(value),
    Fraction: lambda value, _depth: _int(value.numerator) + _int(value.denominator),
    UUID: lambda value, _depth: _int(value.int),
    datetime: lambda value, _depth: _moment(value),
    date: lambda value, _depth: _date(value),
    time: lambda value, _depth: _time(value),
    timedelta: lambda value, _depth: _duration(value),
    PurePath: lambda value, _depth: _text(PurePath.__str__(value)),
    ZoneInfo: lambda value, _depth: _zone(value),
    **_CONTAINERS,
}


_encoders: weakref.WeakKeyDictionary[type, Encoder] = weakref.WeakKeyDictionary()


def _encoder_of(kind: type) -> Encoder:
    """Return what encodes the objects of a class, found at the first of them."""
    encoder = _encoders[kind] = _make_encoder(kind)
    return encoder


def _make_encoder(kind: type) -> Encoder:
    # What is returned must not hold the class, or the class would never be collected.
    if hasattr(kind, "__cache_key__"):
        head = _named(b"K", kind)
        return lambda value, depth: head + encode(type(value).__cache_key__(value), depth)
    if issubclass(kind, Enum):
        head = _named(b"E", kind)
        if issubclass(kind, Flag):
            return lambda value, _depth: head + _int(value.value)
        return lambda value, _depth: head + _text(value.name)
    if issubclass(kind, type):
        return lambda value, _depth: _named(b"C", value)
    if issubclass(kind, FunctionType | BuiltinFunctionType):
        return lambda value, _depth: _function(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, numpy.generic):
        return lambda value, _depth: _numpy_scalar(value)
    base = next((each for each in _BASES if issubclass(kind, each)), None)
    names = _fields_of(kind)
    if names is not None:
        return _of_fields(_named(b"O", kind), names, _BASES.get(base or object))
    if base is None:
        raise Unencodable(f"a {_name(kind)} has no stable encoding")
    # A subclass of a plain type (a str with extra methods, a named tuple) counts by its class too,
    # and by the attributes its objects have besides the plain value.
    head, plain, built_on = _named(b"Y", kind), _BASES[base], base
    return lambda value, depth: (
        head + plain(value, depth) + encode(_attributes(value, type(value), built_on), depth)
    )


def _of_fields(head: bytes, names: list[str], plain: Encoder | None) -> Encoder:
    labels = [(name, _text(name)) for name in names]

    def encoder(value: Any, depth: int) -> bytes:
        parts = [label + encode(getattr(value, name), depth) for name, label in labels]
        if extra := getattr(value, "__pydantic_extra__", None):
            parts += [_text(name) + encode(item, depth) for name, item in sorted(extra.items())]
        whole = head + _joined(b"o", parts)
        return whole if plain is None else whole + plain(value, depth)

    return encoder


def _attributes(value: Any, kind: type, base: type) -> tuple[dict[str, Any], ...]:
    """What an object has in addition to the plain value of its base class: slots, and attributes."""
    found: dict[str, Any] = {}
    for each in kind.__mro__[: kind.__mro__.index(base)]:
        if not each.__flags__ & _HEAP_TYPE:
            # A class written in C may keep anything (pandas' Timestamp: nanoseconds).
            raise Unencodable(f"a {_name(kind)} has no stable encoding: its parts are not visible")
        slots = each.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            name = slot
            if slot.startswith("__") and not slot.endswith("__"):
                name = f"_{each.__name__.lstrip('_')}{slot}"
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[f"{_name(each)}.{name}"] = getattr(value, name)
    own = getattr(value, "__dict__", None)
    return (found, own or {}) if found or own else ()


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


def _fields_of(kind: Any) -> list[str] | None:
    """The names of what makes up a dataclass, msgspec struct or pydantic model."""
    if is_dataclass(kind):
        # field(compare=False) says of itself that it is no part of the value.
        return [each.name for each in fields(kind) if each.compare]
    if issubclass(kind, msgspec.Struct):
        return list(kind.__struct_fields__)
    pydantic = sys.modules.get("pydantic")  # imported by the module of any model
    if pydantic is not None and issubclass(kind, pydantic.BaseModel):
        return list(kind.model_fields)
    return None


def _numpy_scalar(value: Any) -> bytes:
    kind = value.dtype
    if isinstance(value, str):
        return _sized(b"n", b"U") + _text(str.__str__(value))
    if isinstance(value, bytes):
        return _sized(b"n", b"S") + _sized(b"b", bytes.__getitem__(value, slice(None)))
    # Of a longdouble's bytes some are padding; a structure may hold objects.
    if kind.kind not in "biufcmM" or kind.itemsize > (16 if kind.kind == "c" else 8):
        raise Unencodable(f"a numpy {kind.name} has no stable encoding")
    big = kind.newbyteorder(">")
    return _sized(b"n", big.str.encode()) + _sized(b"b", value.astype(big).tobytes())


# -- names of classes and functions --------------------------------------------------------

# A name in a key stands for one class. The second of that name (a class made by a function that was
# called twice, two named tuples called alike) is refused while the first lives.
_named_classes: weakref.WeakValueDictionary[bytes, type] = weakref.WeakValueDictionary()
_class_names: weakref.WeakKeyDictionary[type, bytes] = weakref.WeakKeyDictionary()
_lock = new_lock(sys.modules[__name__])


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _named(tag: bytes, kind: type) -> bytes:
    name = _class_names.get(kind)
    return tag + (_claim(kind) if name is None else name)


def _claim(kind: type) -> bytes:
    """Give a class its name, unless another one has it."""
    name = _full_name(kind)
    with _lock:
        if _named_classes.get(name, kind) is not kind and not is_importable(kind):
            gc.collect()  # the other one may be garbage
            if _named_classes.get(name, kind) is not kind:
                raise Unencodable(
                    f"another class is called {_name(kind)} too, and values of both would share keys"
                )
        _named_classes[name] = kind
        _class_names[kind] = name
    return name


def _full_name(thing: Any) -> bytes:
    # What multiprocessing's spawn calls a program's own module, in the children.
    module = "__main__" if thing.__module__ == "__mp_main__" else thing.__module__
    return _text(str(module)) + _text(thing.__qualname__)


def is_importable(thing: Any) -> bool:
    found: Any = sys.modules.get(thing.__module__ or "")
    for part in thing.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is thing


def _function(value: Any) -> bytes:
    if not is_importable(value):
        raise Unencodable(f"the function {value.__qualname__} cannot be imported by its name")
    return b"L" + _full_name(value)


# -- binding -------------------------------------------------------------------------------


def signature_of(fn: Callable[..., Any]) -> inspect.Signature:
    """Return a function's signature, its annotations unresolved."""
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        return inspect.signature(fn, annotation_format=Format.FORWARDREF)
    return inspect.signature(fn)


_SPREAD = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_BY_POSITION = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}


class Binder:
    """Makes keys of the calls of one function, by the arguments of `cached` and what the function
    closes over. ``f(1)``, ``f(a=1)`` and ``f()`` with the default 1 are the same call."""

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str,
        ignore: tuple[str, ...],
        key: Callable[..., Any] | None,
        tags: tuple[str, ...],
        closed_over: bytes = b"",
    ) -> None:
        self.signature: inspect.Signature = signature_of(fn)
        self.name = name
        self._ignore = frozenset(ignore)
        self._key = key
        self._tags = tags
        self._closed_over = closed_over
        self.has_tags: bool = bool(tags)
        self._what = f"cached {fn.__qualname__}()"
        parameters = self.signature.parameters
        for each in ignore:
            if each not in parameters:
                raise TypeError(f"{self._what}: ignore names {each!r}, which is no parameter of it")
        self._check_tags(parameters.keys() - self._ignore)
        every = parameters.values()
        # Of helpers such as invalidate(): ignored parameters may be left out.
        self._lenient = self.signature.replace(
            parameters=[
                each for each in every if each.name not in self._ignore or each.kind in _SPREAD
            ]
        )
        # The parameters' names, where a call by position alone needs no binding.
        self._plain = tuple(parameters) if {each.kind for each in every} <= _BY_POSITION else None
        self._default_of = {
            each.name: each.default for each in every if each.default is not each.empty
        }
        self._defaults = tuple(self._default_of.values())
        self._labels = {each: _text(each) for each in parameters} | {"key=": b""}

    def _check_tags(self, known: set[str]) -> None:
        for template in self._tags:
            try:
                names = [each[1] for each in Formatter().parse(template) if each[1] is not None]
            except ValueError as error:
                raise TypeError(
                    f"{self._what}: the tag {template!r} is no template: {error}"
                ) from None
            for name in names:
                first = name.split(".")[0].split("[")[0]
                if first not in known:
                    raise TypeError(
                        f"{self._what}: the tag {template!r} names {first or '{}'!r}; it can name "
                        "the parameters that are not ignored: "
                        + (", ".join(sorted(known)) or "none")
                    )

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, lenient: bool = False
    ) -> dict[str, Any]:
        """Return the arguments by parameter, defaults filled in; `lenient`: those that do not count
        may be left out."""
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
            counted = {name: kwargs[name] for name in kwargs if name not in self._ignore}
            try:
                bound = self._lenient.bind(*args, **counted)
            except TypeError:
                bound = self.signature.bind(*args, **kwargs)
        else:
            bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def digest(self, arguments: dict[str, Any]) -> str:
        """Return the 160-bit digest of what counts of the arguments."""
        if self._key is not None:
            arguments = {"key=": self._key_value(arguments)}
        parts = [self._closed_over]
        for name, value in arguments.items():
            if name not in self._ignore:
                fast = _EXACT.get(type(value))
                parts.append(self._labels[name])
                try:
                    parts.append(encode(value) if fast is None else fast(value))
                except Unencodable as why:
                    parts.append(self._in_place_of(name, value, str(why)))
        return blake2b(b"".join(parts), digest_size=20).hexdigest()

    def _key_value(self, arguments: dict[str, Any]) -> Any:
        assert self._key is not None
        bound = inspect.BoundArguments(
            self.signature,
            {name: arguments[name] for name in arguments if name not in self._ignore},
        )
        return self._key(*bound.args, **bound.kwargs)

    def _in_place_of(self, name: str, value: Any, reason: str) -> bytes:
        if name == "key=":
            raise TypeError(
                f"{self._what}: what key= returned cannot be part of a key: {reason}. Return plain "
                "values, such as a tuple of ids"
            ) from None
        if name in self._default_of and self._default_of[name] is value:
            return b"?"  # a sentinel: this parameter was not passed
        raise TypeError(
            f"{self._what}: the parameter {name!r} cannot be part of the key: {reason}. "
            f"Leave it out with ignore=({name!r},), say what counts with key=, or give its class "
            "a __cache_key__() method"
        ) from None

    def tags(self, arguments: dict[str, Any]) -> tuple[str, ...]:
        return tuple(template.format_map(arguments) for template in self._tags)
