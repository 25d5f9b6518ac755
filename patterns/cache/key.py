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
from typing import Any
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


def _members_of(tag: bytes, parts: Iterable[Any], depth: int, *, ordered: bool) -> bytes:
    encoded = [encode(each, depth) for each in parts]
    return _joined(tag, encoded if ordered else sorted(encoded))


def _pairs(tag: bytes, pairs: Iterable[tuple[Any, Any]], depth: int, *, ordered: bool) -> bytes:
    encoded = [encode(key, depth) + encode(item, depth) for key, item in pairs]
    return _joined(tag, encoded if ordered else sorted(encoded))


def _dict(value: dict[Any, Any], depth: int) -> bytes:
    return _pairs(b"M", dict.items(value), depth, ordered=False)


def _defaultdict(value: defaultdict[Any, Any], depth: int) -> bytes:
    return b"G" + encode(value.default_factory, depth) + _dict(value, depth)


def _partial(value: functools.partial[Any], depth: int) -> bytes:
    parts = (value.func, value.args, value.keywords, value.__dict__)
    return b"P" + b"".join(encode(each, depth) for each in parts)


def _method(value: MethodType, depth: int) -> bytes:
    return b"W" + encode(value.__self__, depth) + encode(value.__func__, depth)


_CONTAINERS: dict[type, Callable[[Any, int], bytes]] = {
    tuple: lambda value, depth: _members_of(b"t", tuple.__iter__(value), depth, ordered=True),
    list: lambda value, depth: _members_of(b"l", list.__iter__(value), depth, ordered=True),
    set: lambda value, depth: _members_of(b"S", set.__iter__(value), depth, ordered=False),
    frozenset: lambda value, depth: _members_of(
        b"Z", frozenset.__iter__(value), depth, ordered=False
    ),
    # Two of them with another order are not equal, as two dicts are.
    OrderedDict: lambda value, depth: _pairs(b"Q", OrderedDict.items(value), depth, ordered=True),
    defaultdict: _defaultdict,
    dict: _dict,
    functools.partial: _partial,
    MethodType: _method,
}

# What a subclass may be built on; the narrower class first.
_BASES: dict[type, Callable[[Any, int], bytes]] = {
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


def _encode_other(value: Any, depth: int) -> bytes:
    kind = type(value)
    container = _CONTAINERS.get(kind)
    if container is not None:
        return container(value, depth)
    own = getattr(kind, "__cache_key__", None)
    if own is not None:
        return _named(b"K", kind) + encode(own(value), depth)
    if isinstance(value, Flag):
        return _named(b"E", kind) + _int(value.value)
    if isinstance(value, Enum):
        return _named(b"E", kind) + _text(value.name)
    if isinstance(value, type):
        return _named(b"C", value)
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return _function(value)
    scalar = _numpy_scalar(value)
    if scalar is not None:
        return scalar
    base = next((each for each in _BASES if isinstance(value, each)), None)
    members = _members(value, kind)
    if members is not None:
        parts = [_text(name) + encode(item, depth) for name, item in members]
        whole = _named(b"O", kind) + _joined(b"o", parts)
        return whole if base is None else whole + _BASES[base](value, depth)
    if base is None:
        raise Unencodable(f"a {_name(kind)} has no stable encoding")
    # A subclass of a plain type (a str with extra methods, a named tuple) counts by its class too,
    # and by the attributes its objects have besides the plain value.
    whole = _named(b"Y", kind) + _BASES[base](value, depth)
    return whole + encode(_attributes(value, kind, base), depth)


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


def _members(value: Any, kind: type) -> list[tuple[str, Any]] | None:
    """Names and values of what makes up a dataclass, msgspec struct or pydantic model."""
    if is_dataclass(value):
        return [(each.name, getattr(value, each.name)) for each in fields(value) if _compares(each)]
    if isinstance(value, msgspec.Struct):
        return [(name, getattr(value, name)) for name in kind.__struct_fields__]  # type: ignore[attr-defined]  # every Struct has it
    pydantic = sys.modules.get("pydantic")  # imported by the module of any model
    if pydantic is not None and isinstance(value, pydantic.BaseModel):
        extra = value.__pydantic_extra__ or {}
        named = [(name, getattr(value, name)) for name in kind.model_fields]  # type: ignore[attr-defined]  # every model has it
        return named + sorted(extra.items())
    return None


def _compares(each: Any) -> bool:
    # field(compare=False) says of itself that it is no part of the value.
    return bool(each.compare)


def _numpy_scalar(value: Any) -> bytes | None:
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.generic):
        return None
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
    """Whether a class or function is found under its own name."""
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


class Binder:
    """Makes keys of the calls of one function.

    ``f(1)``, ``f(a=1)`` and ``f()`` with the default 1 are the same call.

    Args:
        fn: the function.
        name: distinguishes it from every other function; part of each key.
        ignore: parameters that do not count.
        key: maps what `ignore` leaves of the arguments to what is encoded in their place.
        tags: templates, such as ``"user:{user_id}"``, filled in with the arguments.
        closed_over: what the function closes over, encoded; part of each key.

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
        self._default_of = {
            each.name: each.default
            for each in parameters.values()
            if each.default is not each.empty
        }
        self._defaults = tuple(self._default_of.values())
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
            counted = self._closed_over + self._encode("key=", self._key_value(arguments))
        else:
            parts = [self._closed_over]
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
        try:
            return encode(value) if fast is None else fast(value)
        except Unencodable as why:
            reason = str(why)
        if name == "key=":
            raise TypeError(
                f"{self._what}: what key= returned cannot be part of a key: {reason}. Return plain "
                "values, such as a tuple of ids"
            )
        if name in self._default_of and self._default_of[name] is value:
            return b"?"  # a sentinel: this parameter was not passed
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
