"""`Session` and `SessionInfo`, and how a session's data becomes text: checks, JSON per top-level
key, differences.

Each top-level value is stored as its own JSON text inside a jsonb object. So the server can merge
keys without reading values, and values come back as they went in: jsonb itself would turn 1e22 into
an integer and -0.0 into 0.0, and refuse NUL and lone surrogates.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from json.scanner import make_scanner
from typing import Any, Final

import msgspec

from ..._observe import shown
from ..._ops.codec import encode_value
from ..._ops.serialize import JSON_TYPES
from ...errors import InvalidValueError

DEPTH_MAX = 100  # containers within containers; a cycle meets this limit too
USER_ID_MAX = 1_024  # bytes; the column is indexed
TOKEN_BYTES = 32
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
# ensure_ascii writes NUL and lone surrogates as escapes, which travel; NaN is no JSON.
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode
# What the encoder would do with these, without its frames.
_SCALARS: dict[type, Callable[[Any], str]] = {
    str: json.encoder.encode_basestring_ascii,
    int: int.__repr__,
    bool: {False: "false", True: "true"}.__getitem__,
    type(None): {None: "null"}.__getitem__,
}
_write_texts = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_read_texts = msgspec.json.Decoder(dict[str, str]).decode
_scan = make_scanner(json.JSONDecoder())  # type: ignore[arg-type]  # the stub wants itself


# -- tokens --------------------------------------------------------------------------------


def new_token() -> str:
    """Return 256 random bits as 43 characters that are safe in a cookie."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def is_token(token: object) -> bool:
    """Whether it has the form of a token; costs the same for a megabyte as for a byte."""
    return isinstance(token, str) and len(token) == 43 and _TOKEN.fullmatch(token) is not None


def id_of(token: str) -> bytes:
    """Return what the database knows of a token: its SHA-256, from which there is no way back."""
    return hashlib.sha256(token.encode()).digest()


# -- documents -----------------------------------------------------------------------------


def texts_of(data: Mapping[str, Any], size_max: int, name: str = "data") -> dict[str, str]:
    """Return each top-level key with its value's JSON text.

    Raises:
        InvalidValueError: a key is not a str, or holds NUL or a lone surrogate; a value is not
            JSON (names the path); or all together are larger than `size_max` bytes.
    """
    require_mapping(data, name)
    texts: dict[str, str] = {}
    size = 2
    for key, value in data.items():
        _check_key(key, name)
        encode = _SCALARS.get(type(value), _encode)
        if encode is _encode and not _is_json(value, DEPTH_MAX):
            raise InvalidValueError(_fault(value, f"{name}[{_short(key)}]", DEPTH_MAX))
        try:
            text = encode(value)
        except ValueError:  # an integer of more than 4,300 digits
            raise InvalidValueError(
                f"{name}[{_short(key)}] holds a number that is too long for JSON"
            ) from None
        texts[key] = text
        size += len(key.encode()) + len(text) + 6
    if size > size_max:
        raise InvalidValueError(
            f"{name} is about {size:,} bytes as JSON; max_data_size is {size_max:,}. "
            "Keep large things elsewhere and their keys in the session"
        )
    return texts


def require_mapping(data: object, name: str) -> None:
    """Refuse what has no keys, with InvalidValueError."""
    if type(data) is not dict and not isinstance(data, Mapping):
        raise InvalidValueError(f"{name} must be a mapping, not {type(data).__name__}")


def document(texts: Mapping[str, str]) -> bytes:
    """Return keys and JSON texts as one jsonb object of strings."""
    # Keys as they are (checked, so UTF-8); values are ASCII.
    return _write_texts(texts).encode()


def read_document(raw: bytes) -> dict[str, str]:
    """Return keys and JSON texts of a stored document."""
    return _read_texts(raw)


def values_of(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the values behind the texts; ValueError where one is not JSON."""
    values: dict[str, Any] = {}
    try:
        for key, text in texts.items():
            # json.loads less its searches for whitespace, which cost as much as a short value.
            values[key], end = _scan(text, 0)
            if end != len(text):
                raise ValueError("not JSON")
    except StopIteration:  # nothing begins there
        raise ValueError("not JSON") from None
    return values


def difference(
    before: Mapping[str, str], now: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return what changed (with its new text) and which keys are gone.

    Texts are compared, so a change deep inside a value is seen without being announced.
    """
    changed = {key: text for key, text in now.items() if before.get(key) != text}
    return changed, [key for key in before if key not in now]


# -- other parts ---------------------------------------------------------------------------


def user_of(user_id: object) -> str:
    """Return a user's id as text: a str, or an int in decimal.

    Raises:
        InvalidValueError: another type, empty, too long, NUL or a lone surrogate in it.
    """
    if isinstance(user_id, int) and not isinstance(user_id, bool):
        user_id = int.__repr__(user_id)  # also of an enum's member
    if not isinstance(user_id, str) or not user_id:
        what = (
            "is empty" if user_id == "" else f"must be a str or int, not {type(user_id).__name__}"
        )
        raise InvalidValueError(f"user_id {what}")
    user_id = str.__str__(user_id)
    if "\0" in user_id:
        raise InvalidValueError("user_id contains NUL (\\x00), which PostgreSQL cannot store")
    if len(encode_value(user_id, 4 * USER_ID_MAX)) > USER_ID_MAX:
        raise InvalidValueError(f"user_id is longer than {USER_ID_MAX:,} bytes")
    return user_id


def _check_key(key: object, name: str) -> None:
    if not isinstance(key, str):
        raise InvalidValueError(f"the keys of {name} must be str, not {type(key).__name__}")
    if "\0" in key:
        raise InvalidValueError(f"a key of {name} contains NUL (\\x00), which PostgreSQL refuses")
    # Asked, not tried: the exception of a failed encode() holds the key.
    if not key.isascii() and any("\ud800" <= character <= "\udfff" for character in key):
        raise InvalidValueError(f"a key of {name} holds a lone surrogate, which is no UTF-8")


def _is_json(value: Any, depth: int) -> bool:
    """Whether JSON holds the value without losing or altering it. Subclasses lose their type."""
    kind = type(value)
    if kind is float:
        return math.isfinite(value)
    if kind is dict:
        return depth > 0 and {str}.issuperset(map(type, value)) and _are_json(value.values(), depth)
    if kind is list or kind is tuple:
        return depth > 0 and _are_json(value, depth)
    return kind in JSON_TYPES


def _are_json(values: Iterable[Any], depth: int) -> bool:
    """Whether all within a container are."""
    return _SCALARS.keys() >= set(map(type, values)) or all(
        _is_json(each, depth - 1) for each in values
    )


def _fault(value: Any, path: str, depth: int) -> str:
    """Say what is wrong with a value that is not JSON, and where."""
    kind = type(value)
    if kind in (dict, list, tuple) and not depth:
        return f"{path[:80]}... is nested more than {DEPTH_MAX} deep, or contains itself"
    if kind is dict:
        for key, each in value.items():
            if type(key) is not str:
                return f"{path} has a key that is of type {type(key).__name__}; JSON's are str"
            if not _is_json(each, depth - 1):
                return _fault(each, f"{path}[{_short(key)}]", depth - 1)
    if kind is list or kind is tuple:
        for index, each in enumerate(value):
            if not _is_json(each, depth - 1):
                return _fault(each, f"{path}[{index}]", depth - 1)
    if kind is float:
        return f"{path} is not a finite number, which JSON does not have"
    for plain in (str, int, float, dict, list, tuple):
        if isinstance(value, plain):
            return (
                f"{path} is of type {kind.__name__}, which would come back as a plain "
                f"{plain.__name__}; store {plain.__name__}(value)"
            )
    return (
        f"{path} is of type {kind.__name__}, which JSON does not have; store a str, a "
        "number, a list or a dict made from it"
    )


def _short(key: str) -> str:
    return repr(key if len(key) <= 40 else key[:40] + "...")


# -- what a program holds -----------------------------------------------------------------


class Keep:
    """The default of what a session keeps: its user, its lifetimes."""

    def __repr__(self) -> str:
        return "<unchanged>"


KEEP: Final = Keep()


class Session:
    """One session, as it was when it was loaded or made, and what you changed since.

    Change `data` as any dict, nested values included; `SessionStore.save` finds out what is
    different. A Session belongs to one request: it is not for several threads or tasks at once.

    Attributes:
        id: the secret token, for the cookie and nothing else: **not for logs**. Empty while the
            session was never stored. A rotation replaces it.
        data: a dict of JSON values. Top-level keys are merged one by one with those of other
            requests, and come back in no particular order.
        user_id: whose session it is, or None. Changed by `SessionStore.rotate` only.
        created_at: when it began, by the server's clock (UTC). None while never stored.
        expires_at: when it ends if it is not used again. None while never stored.
        is_new: it was made here and not loaded.
        idle_timeout: seconds of its own; None where the store's hold.
    """

    __slots__ = (
        "_before",
        "_ended",
        "_has_new_life",
        "_meta",
        "_moved",
        "_times",
        "_version",
        "created_at",
        "data",
        "expires_at",
        "id",
        "idle_timeout",
        "is_new",
        "user_id",
    )

    def __init__(
        self,
        data: dict[str, Any],
        *,
        id: str = "",
        user_id: str | None = None,
    ) -> None:
        self.id: str = id
        self.data: dict[str, Any] = data
        self.user_id: str | None = user_id
        self.created_at: datetime | None = None
        self.expires_at: datetime | None = None
        self.is_new: bool = True
        self.idle_timeout: float | None = None
        self._has_new_life = False  # its lifetimes were changed by this program
        self._before: dict[str, str] = {}  # the JSON text of each key as the database has it
        self._version = 0
        self._meta: bytes | None = None
        self._moved = False  # loaded under an id that a rotation has replaced
        self._ended = False  # destroyed by this program
        self._times: tuple[float, float] | None = None  # of its last use, and of the loading

    def _enters_period(self, seconds: float) -> bool:
        """Whether this loading is its first use in one of the periods of that length into which its
        life is cut, by the server's clock."""
        if self._times is None or self.created_at is None:
            return False
        began = self.created_at.timestamp()
        last, now = ((each - began) // seconds for each in self._times)
        return last < now

    @property
    def handle(self) -> str:
        """A name for this session that is no secret: that of its `SessionInfo`, until it rotates.

        Empty while it was never stored. It is no login.
        """
        return id_of(self.id).hex() if self.id else ""

    @shown
    def __repr__(self) -> str:
        # Neither the token, the data nor the user, who may be an e-mail address, and reprs end in
        # logs. The handle is no secret, and names it in `list_user` too.
        state = "ended" if self._ended else "moved" if self._moved else ""
        if not state:
            state = "new" if self.is_new else "loaded"
        return state + (f" handle={self.handle[:8]}..." if self.id else "")


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A live session as its user may see it, on a page "your devices".

    Attributes:
        handle: names the session to `SessionStore.destroy_handle`. No secret, and no token.
        created_at: when it began (UTC, the server's clock).
        seen_at: when it was last used, at most ``touch_interval`` too early.
        expires_at: when it ends if it is not used again.
        ends_at: when it ends in any case.
        metadata: what was given to `SessionStore.create`.
        read_at: the server's time of this reading.
    """

    handle: str
    created_at: datetime
    seen_at: datetime
    expires_at: datetime
    ends_at: datetime
    metadata: Mapping[str, Any]
    read_at: datetime
    _read_clock: float = field(default_factory=time.monotonic, repr=False, compare=False)

    def idle(self) -> float:
        """Return the seconds since it was last used, by now; never below 0."""
        then = (self.read_at - self.seen_at).total_seconds()
        return max(0.0, then + time.monotonic() - self._read_clock)

    def remaining(self) -> float:
        """Return the seconds until it ends if it is not used again; never below 0."""
        then = (self.expires_at - self.read_at).total_seconds()
        return max(0.0, then - (time.monotonic() - self._read_clock))
