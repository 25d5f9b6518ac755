"""Parameters to bytes and columns back, and the arithmetic of prefixes."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgkv._ops import codec as _codec
from pgkv.errors import InvalidKeyError, InvalidValueError

INT8 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
# Characters at the seams of UTF-8 and of the surrogates.
SEAMS = st.text(
    st.sampled_from("a\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010fffe\U0010ffff"),
    max_size=5,
)
MOMENTS = st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=-7))]))


@given(INT8)
def test_int8(value: int) -> None:
    """Signed 64-bit integers travel both ways."""
    assert _codec.decode_int(_codec.encode_int8(value)) == value


@given(st.floats())
def test_float8(value: float) -> None:
    """Floats travel both ways, infinities and NaN too."""
    back = _codec.decode_float8(_codec.encode_float8(value))
    assert back == value or (math.isnan(back) and math.isnan(value))


@given(MOMENTS)
def test_moments(moment: datetime) -> None:
    """Every aware datetime travels both ways to the microsecond and comes back in UTC."""
    try:
        in_utc = moment.astimezone(UTC)
    except OverflowError:
        return
    back = _codec.decode_moment(_codec.encode_moment(moment))
    assert back == in_utc
    assert back.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("raw", "moment"),
    [
        (2**63 - 1, datetime.max.replace(tzinfo=UTC)),
        (-(2**63), datetime.min.replace(tzinfo=UTC)),
        (0, datetime(2000, 1, 1, tzinfo=UTC)),
    ],
)
def test_moments_beyond_python(raw: int, moment: datetime) -> None:
    """What PostgreSQL can say and Python not (infinity) becomes the nearest that exists."""
    assert _codec.decode_moment(_codec.encode_int8(raw)) == moment


def test_no_moment() -> None:
    """NULL is None."""
    assert _codec.decode_moment_or_none(None) is None


@given(st.floats(1e-9, _codec.TTL_MAX))
def test_ttl(ttl: float) -> None:
    """A ttl becomes whole microseconds, rounded up: never zero, never less than was asked."""
    micro, days, months = struct.unpack("!qii", _codec.encode_ttl(ttl))
    assert (days, months) == (0, 0)
    assert micro >= 1
    assert ttl <= micro / 1e6 * (1 + 1e-12)
    assert micro - ttl * 1e6 <= 1 + ttl * 1e6 * 1e-12


@pytest.mark.parametrize(
    ("ttl", "micro"),
    [
        (1, 10**6),
        (timedelta(microseconds=1), 1),
        (1e-300, 1),
        (0.0000011, 2),
        (True + 0.5, 1_500_000),
    ],
)
def test_ttls(ttl: float, micro: int) -> None:
    """Durations are numbers of seconds or timedeltas."""
    assert struct.unpack("!qii", _codec.encode_ttl(ttl))[0] == micro


@given(st.lists(st.binary(max_size=6), max_size=6))
def test_arrays(items: list[bytes]) -> None:
    """An array carries its elements one after the other, each with its length."""
    raw = _codec.encode_array(items, _codec.BYTEA_OID)
    dimensions, nulls, oid, length, lower = struct.unpack_from("!iiiii", raw)
    assert (dimensions, nulls, oid, length, lower) == (1, 0, 17, len(items), 1)
    at, back = 20, []
    while at < len(raw):
        (size,) = struct.unpack_from("!i", raw, at)
        back.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    assert back == items


@given(TEXT | SEAMS, TEXT | SEAMS)
def test_successor(prefix: str, other: str) -> None:
    """A text begins with the prefix exactly if it lies between the prefix and its successor, by
    UTF-8 bytes.
    """
    low, high, raw = prefix.encode(), _codec.successor(prefix.encode()), other.encode()
    inside = low <= raw and (high is None or raw < high)
    assert inside == other.startswith(prefix)
    extended = (prefix + other).encode()
    assert low <= extended
    assert high is None or extended < high


@pytest.mark.parametrize(
    ("prefix", "successor"),
    [
        ("a", "b"),
        ("az", "a{"),
        ("\x7f", "\x80"),
        ("\ud7ff", "\ue000"),
        ("a\U0010ffff", "b"),
        ("a\U0010ffff\U0010ffff", "b"),
        ("\uffff", "\U00010000"),
    ],
)
def test_successors(prefix: str, successor: str) -> None:
    """The last character that has a successor is raised, what follows it dropped."""
    assert _codec.successor(prefix.encode()) == successor.encode()


@pytest.mark.parametrize("prefix", ["", "\U0010ffff", "\U0010ffff" * 3])
def test_no_successor(prefix: str) -> None:
    """Above the last character there is nothing."""
    assert _codec.successor(prefix.encode()) is None


@given(TEXT.filter(bool), TEXT)
def test_keys(key: str, prefix: str) -> None:
    """A key is its UTF-8, behind the namespace's prefix."""
    assert _codec.encode_key(key, prefix.encode(), 1024) == (prefix + key).encode()


@given(st.binary() | st.text(st.characters(exclude_categories=["Cs"])))
def test_values(value: bytes | str) -> None:
    """Values are bytes as they are, or UTF-8."""
    raw = _codec.encode_value(value, 10**6)
    assert raw == (value.encode() if isinstance(value, str) else value)


# Good ones and each kind of bad one.
KEYS = st.lists(st.sampled_from(["", "a\0b", "\0", "\ud800", "long-key", b"a", 7, None]) | TEXT)
VALUES = st.lists(
    st.sampled_from(["\ud800", b"large value", 7, None]) | st.binary(max_size=9) | TEXT
)


@given(KEYS, st.sampled_from([b"", b"ns:"]))
def test_many_keys(keys: list[Any], prefix: bytes) -> None:
    """Keys encoded together are what each of them is alone, refusals included."""
    together = outcome(lambda: _codec.encode_keys(keys, prefix, 8))
    assert together == outcome(lambda: [_codec.encode_key(key, prefix, 8) for key in keys])


@given(VALUES)
def test_many_values(values: list[Any]) -> None:
    """Values encoded together are what each of them is alone, refusals included."""
    together = outcome(lambda: _codec.encode_values(values, 10))
    assert together == outcome(lambda: [_codec.encode_value(value, 10) for value in values])


def outcome(encode: Callable[[], Any]) -> Any:
    try:
        return list(encode())
    except (InvalidKeyError, InvalidValueError) as error:
        return str(error)


def test_views_are_copied() -> None:
    """A buffer that the caller changes afterwards does not change what is sent."""
    buffer = bytearray(b"abc")
    for view in (buffer, memoryview(buffer), memoryview(buffer)[::2]):
        raw = _codec.encode_value(view, 10)
        before = bytes(view)
        buffer[0] ^= 1
        assert raw == before


@pytest.mark.parametrize(("size", "fits"), [(9, True), (10, True), (11, False)])
def test_value_size(size: int, fits: bool) -> None:
    """max_value_size itself still fits."""
    if fits:
        assert len(_codec.encode_value(b"x" * size, 10)) == size
    else:
        with pytest.raises(InvalidValueError, match="is 11 bytes; max_value_size is 10"):
            _codec.encode_value(b"x" * size, 10)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 7), st.integers(1, 120))
def test_chunks(sizes: list[int], rows: int, size: int) -> None:
    """Chunks keep the order, leave nothing out, and hold their bounds unless one item is larger."""
    items = [b""] * len(sizes)
    cuts = _codec.chunks(items, sizes, rows, size)
    assert [n for cut in cuts for n in range(*cut.indices(len(items)))] == list(range(len(items)))
    for cut in cuts:
        part = sizes[cut]
        assert 1 <= len(part) <= rows
        assert sum(part) <= size or len(part) == 1
