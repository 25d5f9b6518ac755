"""Values compressed and encrypted at rest: what stands between a caller's bytes and the table's.

`Config(transforms=[...])` takes at most one compression, then at most one encryption. A stored value
then is a frame: `MAGIC`, the format, the method of compression, the key's id, and the body. Which
statements carry frames is said in `_sql.transformed`; nothing here knows of SQL.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from .config import require_bool, require_int
from .errors import ConfigError, DecodingError

MAGIC = b"\x00pk"
FORMAT = 1
HEAD = 6  # bytes: MAGIC, format, method, key id
NONCE = 12  # bytes
METHODS = {0: "", 1: "zstd", 2: "lz4"}
OWN = (b"pgkv:rate:", b"pgkv:cache:")  # in the keys of limiters and cached functions
INTEGER = re.compile(rb"-?[0-9]{1,19}")


class Compression:
    """What `Zstd` and `Lz4` share.

    Args:
        min_size: bytes; a shorter value is stored as it is.
    """

    method: int
    _pack: Callable[[bytes], bytes]
    _size: Callable[[bytes], int]  # that a packed value declares; negative for none
    _unpack: Callable[[bytes], bytes]  # may raise anything for a damaged one

    def __init__(self, min_size: int) -> None:
        require_int(f"{type(self).__name__}(min_size=)", min_size, 0, 1 << 30)
        self.min_size = min_size
        self._facts = f" min_size={min_size}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}{getattr(self, '_facts', '')}>"


class Zstd(Compression):
    """Compress values with Zstandard. Needs the extra ``compression``.

    Args:
        level: 1 (fast) to 19 (small).
        min_size: bytes; a shorter value is stored as it is.

    Raises:
        ConfigError: a number is out of range, or the library is missing.
    """

    method = 1

    def __init__(self, level: int = 3, min_size: int = 512) -> None:
        super().__init__(min_size)
        require_int("Zstd(level=)", level, 1, 19)
        self.level = level
        self._facts += f" level={level}"
        if sys.version_info >= (3, 14):
            lib = _library("compression.zstd", "compression")
            self._pack = lambda value: lib.compress(value, level)
            self._size = lambda body: lib.get_frame_info(body).decompressed_size or -1
            # One frame: the library's function goes on with those after it.
            self._unpack = lambda body: lib.ZstdDecompressor().decompress(body)
            return
        lib = _library("zstandard", "compression")
        local = threading.local()

        def own() -> Any:  # objects that threads cannot share, and that are slow to make
            if not hasattr(local, "pack"):
                local.pack = lib.ZstdCompressor(level=level).compress
                local.unpack = lib.ZstdDecompressor().decompress
            return local

        self._pack = lambda value: own().pack(value)
        self._size = lib.frame_content_size
        self._unpack = lambda body: own().unpack(body)


class Lz4(Compression):
    """Compress values with LZ4: faster than `Zstd`, and larger. Needs the extra ``compression``.

    Args:
        min_size: bytes; a shorter value is stored as it is.

    Raises:
        ConfigError: a number is out of range, or the library is missing.
    """

    method = 2

    def __init__(self, min_size: int = 512) -> None:
        super().__init__(min_size)
        lib = _library("lz4.block", "compression")  # its blocks stand behind their size
        self._pack = lib.compress
        self._size = lambda body: int.from_bytes(body[:4], "little") if len(body) > 4 else -1
        self._unpack = lib.decompress


class AesGcmSiv:
    """Encrypt values with AES-256-GCM-SIV (RFC 8452). Needs the extra ``encryption``.

    A value is bound to the context, the table and the key: copied to another it does not open. In
    the clear are keys, lengths, times and versions; who may write the table can delete a value or
    put an older one of the same key back. A lost key is lost values.

    Args:
        keys: 32 bytes each, by an id from 1 to 255. The first encrypts, all of them decrypt.
        context: names the application. Another context's values do not open.
        read_plain: also return values that are not encrypted, while a table is being encrypted:
            who may write the table can then put plain values in.
        plain_integers: allow `increment`, whose numbers are not encrypted, and read decimal numbers.

    Raises:
        ConfigError: a key or an id is not as said, or the library or its OpenSSL is missing.
    """

    def __init__(
        self,
        keys: Mapping[int, bytes],
        *,
        context: str = "",
        read_plain: bool = False,
        plain_integers: bool = False,
    ) -> None:
        given: Any = keys
        if not isinstance(given, Mapping) or not given:
            raise ConfigError("AesGcmSiv(keys=) must map at least one id to a key")
        for number, key in given.items():
            require_int("an id in AesGcmSiv(keys=)", number, 1, 255)
            if not isinstance(key, bytes) or len(key) != 32:
                raise ConfigError(f"AesGcmSiv(keys=): key {number} must be 32 bytes")
        given = context
        if not isinstance(given, str):
            raise ConfigError("AesGcmSiv(context=) must be a str")
        for name, flag in (("read_plain", read_plain), ("plain_integers", plain_integers)):
            require_bool(f"AesGcmSiv({name}=)", flag)
        aead = _library("cryptography.hazmat.primitives.ciphers.aead", "encryption")
        try:
            self._ciphers: dict[int, Any] = {n: aead.AESGCMSIV(key) for n, key in keys.items()}
        except Exception as error:  # noqa: BLE001  # cryptography's own, which needs an import
            why = type(error).__name__
        else:
            why = ""
        if why:
            raise ConfigError(
                f"AesGcmSiv needs a cryptography built on OpenSSL 3.2 or later ({why})"
            )
        self.ids: tuple[int, ...] = tuple(keys)
        self.context = context
        self._facts = f" ids={self.ids} context={context!r}"
        self.read_plain = read_plain
        self.plain_integers = plain_integers

    def __repr__(self) -> str:  # the keys are secrets
        return f"<AesGcmSiv{getattr(self, '_facts', '')}>"

    def _encrypt(self, body: bytes, bound: bytes) -> bytes:
        """Return nonce, ciphertext and tag, by the first key."""
        nonce = os.urandom(NONCE)
        return nonce + self._ciphers[self.ids[0]].encrypt(nonce, body, bound)  # type: ignore[no-any-return]  # bytes

    def _decrypt(self, number: int, body: bytes, bound: bytes) -> bytes | None:
        """Return what was encrypted; None where it is damaged, or bound to something else."""
        try:
            return self._ciphers[number].decrypt(body[:NONCE], body[NONCE:], bound)  # type: ignore[no-any-return]  # bytes
        except Exception:  # noqa: BLE001  # whatever the library makes of damage
            return None


class Transforms:
    """The transforms of one table.

    Args:
        steps: at most one compression, then at most one encryption.
        table: its name, to which encrypted values are bound.
        size_max: bytes; a value that declares more is not decompressed.
    """

    def __init__(self, steps: Sequence[Any], table: str, size_max: int) -> None:
        self.compression: Compression | None = next(
            (each for each in steps if isinstance(each, Compression)), None
        )
        self.cipher: AesGcmSiv | None = next(
            (each for each in steps if isinstance(each, AesGcmSiv)), None
        )
        self.steps: tuple[Any, ...] = tuple(steps)
        self._size_max = size_max
        self._prefix = MAGIC + bytes((FORMAT,))
        if self.cipher is not None:
            names = self.cipher.context.encode(), table.encode()
            self._bound = b"".join(len(name).to_bytes(4, "big") + name for name in names)
        number = 0 if self.cipher is None else self.cipher.ids[0]
        packs = self.compression is not None and self.compression.min_size <= size_max
        method = self.compression.method if self.compression and packs else 0
        # What a row begins with that `rewrite` need not look at.
        self.head: bytes = self._prefix + bytes((method, number))

    def seal(self, key: bytes, value: bytes) -> bytes:
        """Return a value as it is stored under that key."""
        method, body = 0, value
        if self.compression is not None and len(value) >= self.compression.min_size:
            packed = self.compression._pack(value)
            if len(packed) < len(value):
                method, body = self.compression.method, packed
        if self.cipher is not None:
            head = self._prefix + bytes((method, self.cipher.ids[0]))
            return head + self.cipher._encrypt(body, self._bound + head + key)
        if not method and not value.startswith(MAGIC):
            return value
        return self._prefix + bytes((method, 0)) + body

    def open(self, key: bytes, raw: bytes) -> bytes:
        """Return the value in what is stored under that key.

        Raises:
            DecodingError: it is not what `seal` made, for this key or by these transforms.
        """
        cipher = self.cipher
        if not raw.startswith(MAGIC):
            if cipher is None or cipher.read_plain or self.is_plain_number(raw):
                return raw
            raise _unreadable(key, 0, "it is not encrypted, and read_plain is off")
        if len(raw) < HEAD or raw[3] != FORMAT or raw[4] not in METHODS:
            raise _unreadable(key, 0, "its format is unknown")
        head, method, number, body = raw[:HEAD], raw[4], raw[5], raw[HEAD:]
        if number:
            if cipher is None or number not in cipher.ids:
                raise _unreadable(
                    key, number, f"it is encrypted with key {number}, which is not given"
                )
            opened = cipher._decrypt(number, body, self._bound + head + key)
            if opened is None:
                raise _unreadable(
                    key,
                    number,
                    f"key {number} does not open it: another key, place, context, or damage",
                )
            body = opened
        elif cipher is not None and not cipher.read_plain:
            raise _unreadable(key, 0, "it is not encrypted, and read_plain is off")
        return self._inflated(key, method, number, body) if method else body

    def listed(self, key: bytes, raw: bytes) -> bytes:
        """As `open`, for a list of rows: those that the server or a pattern reads are not transformed."""
        return raw if is_own(key, raw) else self.open(key, raw)

    def _inflated(self, key: bytes, method: int, number: int, body: bytes) -> bytes:
        library = _reader(method, self.compression)
        declared, value = -1, b""
        try:
            declared = library._size(body)
            if 0 <= declared <= self._size_max:
                value = library._unpack(body)
        except Exception:  # noqa: BLE001  # whatever the library makes of damage
            declared = -1
        if declared > self._size_max:
            raise _unreadable(
                key, number, f"it would have {declared:,} bytes, above max_value_size"
            )
        if declared < 0 or len(value) != declared:
            raise _unreadable(key, number, "what was compressed is damaged")
        return value

    def is_plain_number(self, raw: bytes) -> bool:
        """Whether a stored value is a number that is not encrypted, and need not be."""
        cipher = self.cipher
        numbers = cipher is not None and cipher.plain_integers
        return numbers and INTEGER.fullmatch(raw) is not None


def is_own(key: bytes, raw: bytes) -> bool:
    """Whether a row is one of a limiter or a cached function, of which values are not transformed."""
    return any(mark in key for mark in OWN) and not raw.startswith(MAGIC)


def applied(raw: bytes) -> tuple[str, ...]:
    """Return the names of what was done to a stored value."""
    if not raw.startswith(MAGIC) or len(raw) < HEAD:
        return ()
    method, number = METHODS.get(raw[4], "?"), raw[5]
    return ((method,) if method else ()) + ((f"aes:{number}",) if number else ())


def checked(steps: object) -> tuple[Any, ...]:
    """Return the transforms of a `Config`.

    Raises:
        ConfigError: something else, or in another order.
    """
    if isinstance(steps, str | bytes) or not isinstance(steps, Sequence):
        raise ConfigError("transforms must be a list, such as [pgkv.Zstd()]")
    kinds = [isinstance(each, Compression) + 2 * isinstance(each, AesGcmSiv) for each in steps]
    if kinds not in ([], [1], [2], [1, 2]):
        raise ConfigError(
            "transforms takes at most one of pgkv.Zstd and pgkv.Lz4, and after it at most one "
            "pgkv.AesGcmSiv"
        )
    return tuple(steps)


_readers: dict[int, Compression] = {}


def _reader(method: int, own: Compression | None) -> Compression:
    """Return what reads values of that method, also where another one writes."""
    if own is not None and own.method == method:
        return own
    if method not in _readers:
        _readers[method] = Zstd() if method == Zstd.method else Lz4()
    return _readers[method]


def _unreadable(key: bytes, number: int, why: str) -> DecodingError:
    error = DecodingError(f"the value of {key.decode(errors='replace')!r} cannot be read: {why}")
    error.key, error.key_id = key.decode(errors="replace"), number
    return error


def _library(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        pass
    raise ConfigError(f"{name} is not installed: pip install 'pgkv-toolkit[{extra}]'")
