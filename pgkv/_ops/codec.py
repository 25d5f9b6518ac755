"""How Python values cross the wire: parameters to bytes, binary columns back.

Bad input is refused here, each fault with its own message, before anything is sent. This module
knows no SQL. Layouts are PostgreSQL's binary formats: big-endian, times in microseconds since 2000.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from struct import Struct
from typing import TYPE_CHECKING, TypeAlias

from ..errors import InvalidKeyError, InvalidValueError

if TYPE_CHECKING:
    from ..config import Seconds

Value: TypeAlias = bytes | bytearray | memoryview | str

TTL_MAX = (
    1000 * 366 * 86400.0
)  # seconds; Python can express the moment, whatever the server's clock
KEY_ENDLESS = "leave it out for a key that never expires"
INT8_MIN, INT8_MAX = -(2**63), 2**63 - 1

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_LATEST = datetime.max.replace(tzinfo=UTC)
_EARLIEST = datetime.min.replace(tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_INT8 = Struct("!q")
_INT4 = Struct("!i")
_FLOAT8 = Struct("!d")
_INTERVAL = Struct("!qii")  # microseconds, days, months
_ARRAY = Struct("!iiiii")  # dimensions, has nulls, element type, length, lower bound
TEXT_OID, BYTEA_OID, INT8_OID, FLOAT8_OID = 25, 17, 20, 701
_LENGTHS = [_INT4.pack(length) for length in range(512)]  # of most keys


# -- checks -----------------------------------------------------------------------


def encode_key(key: str, prefix: bytes, length_max: int, what: str = "key") -> bytes:
    """Return the key's bytes with the namespace's prefix; `what` is what messages call it.

    Raises:
        InvalidKeyError: not a str, empty, too long, holds NUL or a lone surrogate.
    """
    try:
        raw = key.encode()
    except (AttributeError, UnicodeEncodeError):
        raise _bad_key(key, what) from None
    if not raw or b"\0" in raw:
        raise _bad_key(key, what)
    if prefix:
        raw = prefix + raw
    if len(raw) > length_max:
        raise InvalidKeyError(
            f"the {what} is {len(raw):,} bytes long in UTF-8 (namespace prefix included); "
            f"max_key_length is {length_max:,}"
        )
    return raw


def encode_keys(keys: Iterable[str], prefix: bytes, length_max: int) -> list[bytes]:
    """Return the bytes of many keys, checked as by `encode_key` but together: a third of the time."""
    try:
        keys = list(keys)
    except TypeError:
        if hasattr(keys, "__iter__"):
            raise  # from inside the caller's generator
        raise InvalidKeyError(
            f"give several keys as a list or another iterable, not {type(keys).__name__}"
        ) from None
    try:
        raw = "\0".join(keys).encode().split(b"\0")
    except (TypeError, UnicodeEncodeError):
        raw = []
    # A key that contains NUL is split: then there are more parts than keys.
    if len(raw) != len(keys) or b"" in raw or len(max(raw, key=len)) + len(prefix) > length_max:
        return [encode_key(key, prefix, length_max) for key in keys]
    return [prefix + each for each in raw] if prefix else raw


def _bad_key(key: object, what: str) -> InvalidKeyError:
    if not isinstance(key, str):
        return InvalidKeyError(f"a {what} must be a str, not {type(key).__name__}")
    if not key:
        return InvalidKeyError(f"the {what} is empty")
    if "\0" in key:
        return InvalidKeyError(f"the {what} contains NUL (\\x00), which PostgreSQL cannot store")
    return InvalidKeyError(f"the {what} holds a lone surrogate, which UTF-8 cannot express")


def encode_bound(bound: str, name: str) -> bytes:
    """Return a prefix or range bound as bytes; unlike a key it may be empty and of any length.

    Raises:
        InvalidKeyError: not a str, or holds NUL or a lone surrogate.
    """
    if not isinstance(bound, str):
        raise InvalidKeyError(f"{name} must be a str, not {type(bound).__name__}")
    if "\0" in bound:
        raise InvalidKeyError(f"{name} contains NUL (\\x00), which no key can contain")
    try:
        return bound.encode()
    except UnicodeEncodeError:
        raise InvalidKeyError(f"{name} holds a lone surrogate") from None


def encode_value(value: Value, size_max: int) -> bytes:
    """Return the value's bytes; a str becomes UTF-8.

    Raises:
        InvalidValueError: another type, too large, or a str with a lone surrogate.
    """
    if not isinstance(value, bytes):
        if isinstance(value, str):
            encoded = _utf8(value)
            if encoded is None:
                raise InvalidValueError(
                    "the value holds a lone surrogate, which UTF-8 cannot express"
                )
            value = encoded
        elif isinstance(value, bytearray | memoryview):
            value = bytes(value)
        else:
            raise InvalidValueError(
                f"a value must be bytes, bytearray, memoryview or str, not "
                f"{type(value).__name__}; use store.typed(...) to keep other types"
            )
    if len(value) > size_max:
        raise InvalidValueError(
            f"the value is {len(value):,} bytes; max_value_size is {size_max:,}"
        )
    return value


def _utf8(text: str) -> bytes | None:
    # A function of its own, so that the caller's error has no context: this one holds the value.
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


def encode_values(values: Sequence[Value], size_max: int) -> Sequence[bytes]:
    """Return many values' bytes, checked as by `encode_value`."""
    if set(map(type, values)) == {bytes} and max(map(len, values)) <= size_max:
        return values  # type: ignore[return-value]  # all of them are bytes
    return [encode_value(value, size_max) for value in values]


def seconds(
    value: Seconds, name: str = "ttl", zero: bool = False, endless: str = KEY_ENDLESS
) -> float:
    """Return a finite duration in seconds: more than 0, or with `zero` also that.

    Args:
        value: what the caller gave.
        name: what the caller calls it.
        zero: also accept 0.
        endless: advice for a duration without end; the default is for a key's ttl.

    Raises:
        InvalidValueError: zero, negative, NaN, infinite, longer than 1,000 years, not a number.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidValueError(
            f"{name} must be seconds (a number or a timedelta), not {type(value).__name__}"
        )
    # Compared, not converted: NaN fails it too, and an int may be too large for a float.
    if not 0 < value <= TTL_MAX and not (zero and value == 0):
        advice = f"; {endless}" if endless and (name == "ttl" or endless != KEY_ENDLESS) else ""
        if value > 0:
            raise InvalidValueError(f"{name} is beyond 1,000 years{advice}")
        if zero:
            raise InvalidValueError(f"{name} must be 0 seconds or more, not {value!r}{advice}")
        end = "; to end a key now, delete it" if (name, endless) == ("ttl", KEY_ENDLESS) else ""
        raise InvalidValueError(f"{name} must be more than 0 seconds, not {value!r}{end}")
    return float(value)


def waiting(value: Seconds | None, name: str = "timeout") -> float | None:
    """Return how long the caller may wait, in seconds: 0 for not at all, None (also for infinity) for
    no limit."""
    if value is None or (isinstance(value, float) and value == math.inf):
        return None
    return seconds(value, name, zero=True, endless="None waits without end")


def encode_ttl(ttl: Seconds) -> bytes:
    """Return a duration as a binary interval: whole microseconds, rounded up, so never zero."""
    return encode_interval(seconds(ttl))


def encode_interval(seconds: float) -> bytes:
    """Return checked seconds, 0 included, as a binary interval; rounded up."""
    return _INTERVAL.pack(math.ceil(seconds * 1_000_000), 0, 0)


def encode_moment(moment: datetime, name: str = "expires_at") -> bytes:
    """Return an aware datetime as a binary timestamptz.

    Raises:
        InvalidValueError: not a datetime, or a naive one.
    """
    if not isinstance(moment, datetime):
        raise InvalidValueError(f"{name} must be a datetime, not {type(moment).__name__}")
    if moment.utcoffset() is None:
        raise InvalidValueError(
            f"{name} is naive: give it a time zone, such as datetime.now(timezone.utc)"
        )
    return _INT8.pack((moment - _EPOCH) // _MICROSECOND)


def whole(name: str, value: object, low: int = 1) -> int:
    """Return an integer of `low` or more; one beyond 64 bits means "all" and becomes the largest."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InvalidValueError(f"{name} must be an integer of {low} or more, not {value!r}")
    return min(value, INT8_MAX)


def integer(value: object, name: str) -> int:
    """Return a signed 64-bit integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidValueError(f"{name} must be an int, not {type(value).__name__}")
    if not INT8_MIN <= value <= INT8_MAX:
        raise InvalidValueError(f"{name} is outside the signed 64-bit range")
    return value


# -- parameters ----------------------------------------------------------------------------


encode_int8 = _INT8.pack
encode_int4 = _INT4.pack
encode_float8 = _FLOAT8.pack


def encode_array(items: Sequence[bytes], oid: int = TEXT_OID) -> bytes:
    """Return byte strings as one binary array of that element type."""
    parts = [b""] * (2 * len(items) + 1)
    parts[0] = _ARRAY.pack(1, 0, oid, len(items), 1)
    try:
        parts[1::2] = map(_LENGTHS.__getitem__, map(len, items))
    except IndexError:
        parts[1::2] = map(_INT4.pack, map(len, items))
    parts[2::2] = items
    return b"".join(parts)


def encode_int8s(numbers: Iterable[int]) -> bytes:
    """Return integers as one binary array of bigint."""
    return encode_array(list(map(encode_int8, numbers)), INT8_OID)


def decode_array(raw: bytes) -> list[bytes]:
    """Return the byte strings of what `encode_array` made."""
    items: list[bytes] = []
    at = _ARRAY.size
    while at < len(raw):
        begin = at + 4
        at = begin + int.from_bytes(raw[at:begin])
        items.append(raw[begin:at])
    return items


def successor(prefix: bytes) -> bytes | None:
    """Return the smallest string above every string with that prefix; None when there is none.

    UTF-8 orders by code point, so the last character that has a successor is replaced by it and
    the rest dropped. Surrogates are not characters and are skipped.
    """
    text = prefix.decode()
    while text:
        last = ord(text[-1])
        if last < 0x10FFFF:
            following = 0xE000 if last == 0xD7FF else last + 1
            return (text[:-1] + chr(following)).encode()
        text = text[:-1]
    return None


# -- columns -------------------------------------------------------------------------------


def decode_int(raw: bytes | None) -> int:
    """Read an int2, int4 or int8 column."""
    return int.from_bytes(raw or b"", "big", signed=True)


def decode_float8(raw: bytes | None) -> float:
    """Read a float8 column."""
    value: float = _FLOAT8.unpack(raw or b"")[0]
    return value


def decode_moment(raw: bytes | None) -> datetime:
    """Read a timestamptz column; beyond Python's years it becomes the nearest that exists."""
    try:
        return _EPOCH + timedelta(microseconds=decode_int(raw))
    except OverflowError:
        return _LATEST if decode_int(raw) > 0 else _EARLIEST


def decode_moment_or_none(raw: bytes | None) -> datetime | None:
    """Read a nullable timestamptz column."""
    return None if raw is None else decode_moment(raw)


def chunks(items: Sequence[object], sizes: Sequence[int], rows: int, size: int) -> list[slice]:
    """Cut a batch into slices of at most that many rows and (about) bytes."""
    if 0 < len(items) <= rows and sum(sizes) <= size:
        return [slice(0, len(items))]
    cuts: list[slice] = []
    begin = filled = 0
    for index, item_size in enumerate(sizes):
        if index > begin and (index - begin >= rows or filled + item_size > size):
            cuts.append(slice(begin, index))
            begin, filled = index, 0
        filled += item_size
    if begin < len(items):
        cuts.append(slice(begin, len(items)))
    return cuts
