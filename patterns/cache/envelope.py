"""The bytes of a cache entry: what a later call must know of the value, and the value's own bytes.

An entry, and the placeholder of a caller who computes one, begin with a mark that no other fill
shares. A row's version and mark together identify one state of it. For bytes that do not read back
completely, `read` returns None, never an exception.
"""

from __future__ import annotations

import hmac
import math
import os
import pickle
import zlib
from collections.abc import Callable
from hashlib import sha256
from struct import Struct, unpack_from
from struct import error as StructError  # noqa: N812  # as a class is called
from typing import Any, NamedTuple, TypeAlias

from ..._ops.serialize import CodecName, Serializer
from ...errors import ConfigError, SerializationError
from .sql import MARK_LENGTH

# The first byte: the kind of row, and the format's version.
PLACEHOLDER, FORMAT_1 = b"~", b"\x01"
_HEAD = Struct("!IcdddH")  # checksum, codec, soft, hard, compute, number of generations
_CHECKSUM = Struct("!I")


def new_mark(kind: bytes) -> bytes:
    """Return a mark that no fill has used before."""
    return kind + os.urandom(MARK_LENGTH - 1)


def mark_of(raw: bytes) -> bytes:
    return raw[:MARK_LENGTH]


def is_placeholder(raw: bytes) -> bool:
    return raw[:1] == PLACEHOLDER and len(raw) == MARK_LENGTH


class Envelope(NamedTuple):
    """An entry.

    Attributes:
        soft: seconds for which the value is fresh; inf for ever.
        hard: seconds for which it may be served at all.
        compute: seconds that the function took.
        generations: of the function and of the tags, as the miss saw them.
        payload: the codec's bytes.
    """

    soft: float
    hard: float
    compute: float
    generations: tuple[int, ...]
    payload: bytes

    def pack(self, codec: bytes) -> bytes:
        """Return the entry's bytes, under a new mark."""
        count = len(self.generations)
        head = _HEAD.pack(0, codec, self.soft, self.hard, self.compute, count)
        generations = b"".join(each.to_bytes(8, "big") for each in self.generations)
        body = head[_CHECKSUM.size :] + generations + self.payload
        return new_mark(FORMAT_1) + _CHECKSUM.pack(zlib.crc32(body)) + body


def read(raw: bytes, codec: bytes) -> Envelope | None:
    """Return the entry in these bytes; None if they are anything else, or another codec's."""
    if raw[:1] != FORMAT_1:
        return None
    try:
        checksum, found, soft, hard, compute, count = _HEAD.unpack_from(raw, MARK_LENGTH)
    except StructError:
        return None
    if found != codec or zlib.crc32(raw[MARK_LENGTH + _CHECKSUM.size :]) != checksum:
        return None
    start = MARK_LENGTH + _HEAD.size
    end = start + 8 * count
    if len(raw) < end or math.isnan(soft + hard + compute):
        return None
    generations = unpack_from(f"!{count}Q", raw, start)
    return Envelope(soft, hard, compute, generations, raw[end:])


# -- values --------------------------------------------------------------------------------


# Put before an untyped tuple: what msgspec never writes first.
TUPLE_MARKS = {"json": b" ", "msgpack": b"\xc1"}


class TypedCodec:
    """JSON or msgpack, checked against a type. Without a type a tuple comes back as a tuple all the
    same: to a web framework, ``(body, status)`` and ``[body, status]`` are different responses.
    `letter` is in the entry: one of another codec is a miss.
    """

    def __init__(self, type_: Any, codec: CodecName) -> None:
        self._serializer: Serializer[Any] = Serializer(type_, codec)
        self.letter: bytes = codec[:1].encode()
        self.decode: Callable[[str, bytes], Any] = self._serializer.decode
        self._tuple_mark = b""
        if type_ is Any:
            self._tuple_mark = TUPLE_MARKS[codec]
            self.decode = self._decode_untyped

    def _decode_untyped(self, key: str, raw: bytes) -> Any:
        if raw[:1] == self._tuple_mark:
            return tuple(self._serializer.decode(key, raw[1:]))
        return self._serializer.decode(key, raw)

    def encode(self, key: str, value: Any) -> bytes:
        """Return the value's bytes.

        Raises:
            SerializationError: the codec cannot express it; says what can.
        """
        try:
            payload = self._serializer.encode(key, value)
            return self._tuple_mark + payload if type(value) is tuple else payload
        except SerializationError as error:
            why = str(error)
        raise SerializationError(f"{why}; or use codec=pgkv.SignedPickle(key)")


class SignedPickle:
    """A codec for `cached` that keeps any Python object: pickle under an HMAC-SHA256.

    Unpickling runs code, so bytes are unpickled only after their signature, made with `key` over
    them and the entry's name, has been checked: who can write to the table but does not know the
    key gains nothing but misses. The algorithm is fixed here and never read from the data. Prefer
    the default, JSON, where it is enough.

    Args:
        key: the secret, at least 16 bytes, the same in all processes.

    Raises:
        ConfigError: the key is no bytes, or shorter.
    """

    letter: bytes = b"p"

    def __init__(self, key: bytes) -> None:
        given: object = key
        if not isinstance(given, bytes) or len(given) < 16:
            raise ConfigError("SignedPickle needs a secret key of at least 16 bytes")
        self._key = key

    def __repr__(self) -> str:
        return "<SignedPickle>"  # the key is a secret

    def _signature(self, name: str, body: bytes) -> bytes:
        # With the entry's name: a signed entry copied to another key would pass otherwise.
        raw = name.encode()
        signed = len(raw).to_bytes(4, "big") + raw + body
        return hmac.new(self._key, signed, sha256).digest()

    def encode(self, key: str, value: Any) -> bytes:
        """Return the signed pickle of `value`, to be kept under `key`.

        Raises:
            SerializationError: the value cannot be pickled.
        """
        try:
            body = pickle.dumps(value, protocol=5)
        except Exception as error:  # noqa: BLE001  # whatever a class's __reduce__ raises
            why = type(error).__name__
        else:
            return self._signature(key, body) + body
        raise SerializationError(f"{key!r}: a {type(value).__name__} cannot be pickled: {why}")

    def decode(self, key: str, raw: bytes) -> Any:
        """Return the value in `raw`, which was kept under `key`.

        Raises:
            SerializationError: the signature is another one, or the value's class has changed.
        """
        size = sha256().digest_size
        body = raw[size:]
        if not hmac.compare_digest(raw[:size], self._signature(key, body)):
            raise SerializationError(f"the value of {key!r} is not signed with this key")
        try:
            return pickle.loads(body)  # noqa: S301  # signed by us
        except Exception as error:  # noqa: BLE001  # whatever a class's __setstate__ raises
            why = type(error).__name__
        raise SerializationError(f"the value of {key!r} cannot be unpickled: {why}")


Codec: TypeAlias = TypedCodec | SignedPickle
