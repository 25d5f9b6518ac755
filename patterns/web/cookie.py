"""The session cookie: its name, its flags, and how to find it in a request.

Safe by default: ``__Host-`` (no sibling domain can set it), Secure, HttpOnly, SameSite=Lax, and no
Max-Age, so it ends with the browser. Nothing is signed: the token is random, and the database
decides whether it is valid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal, TypeAlias, TypedDict

from ... import _observe
from ...config import Seconds, require_seconds
from ...errors import ConfigError
from ..session.data import is_token

TOKENS_MAX = 4  # the most cookies of one name that are looked up for a request

SameSite: TypeAlias = Literal["lax", "strict", "none"]

_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_DOMAIN = re.compile(r"[\x20-\x3a\x3c-\x7e]+")  # printable ASCII but ';'
_PATH = re.compile(r"/[\x20-\x3a\x3c-\x7e]*")
_PREFIXES = ("__Host-", "__Secure-")
_SHARED = re.compile(r"\s*(public|s-maxage\s*=.*)\s*", re.IGNORECASE)


class CookieOptions(TypedDict, total=False):
    """The session cookie of an application.

    Attributes:
        cookie: its name, ``__Host-session`` by default. ``__Host-...`` binds it to the host, so that
            sibling domains cannot set it; ``__Secure-...`` binds it to https.
        secure: False for plain-http development: the prefix and the flag are dropped, and that is
            logged once.
        same_site: ``"lax"`` (the default), ``"strict"`` or ``"none"``.
        path: the path below which browsers send it; default ``"/"``.
        domain: subdomains of this domain get it too; None (the default): only this host does.
        max_age: seconds for which the browser keeps it, rounded up; None (the default): until it
            closes. While the session is used the cookie is sent again, at the latest when a third of
            this time has passed. A session with an `idle_timeout` of its own has that instead.
        partitioned: give each embedding site a cookie of its own (CHIPS), for an application in a
            frame of other sites, with ``same_site="none"``.
    """

    cookie: str
    secure: bool
    same_site: SameSite
    path: str
    domain: str | None
    max_age: Seconds | None
    partitioned: bool


class Cookie:
    """The session cookie of one application. It takes `CookieOptions`, and refuses what browsers would."""

    def __init__(
        self,
        cookie: str = "__Host-session",
        *,
        secure: bool = True,
        same_site: SameSite = "lax",
        path: str = "/",
        domain: str | None = None,
        max_age: Seconds | None = None,
        partitioned: bool = False,
    ) -> None:
        name = cookie
        if not _is_text(name, _NAME):
            raise ConfigError(
                f"cookie must be a name of letters, digits and -_. (an HTTP token), not {name!r}"
            )
        if same_site not in ("lax", "strict", "none"):
            raise ConfigError(f"same_site must be 'lax', 'strict' or 'none', not {same_site!r}")
        if same_site == "none" and not secure:
            raise ConfigError("browsers refuse same_site='none' without secure=True")
        if partitioned and not secure:
            raise ConfigError("browsers refuse partitioned=True without secure=True")
        if not _is_text(path, _PATH):
            raise ConfigError(f"path must begin with / and hold no ';', not {path!r}")
        if domain is not None and not _is_text(domain, _DOMAIN):
            raise ConfigError(f"domain must be a host name or None, not {domain!r}")
        age = None if max_age is None else math.ceil(require_seconds("max_age", max_age))
        if not secure:
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
            _observe.warning("pgkv.session.insecure_cookie", cookie=name)
        elif name.startswith("__Host-") and (path != "/" or domain is not None):
            raise ConfigError(
                "a __Host- cookie has path='/' and no domain; call it __Secure-... to have them"
            )
        self.name = name
        self._attributes = f"; Path={path}" + ("" if domain is None else f"; Domain={domain}")
        self.max_age = age
        self._flags = f"{'; Secure' if secure else ''}; HttpOnly; SameSite={same_site.capitalize()}"
        self._flags += "; Partitioned" if partitioned else ""

    def set(self, token: str, max_age: float | None = None) -> str:
        """Return the Set-Cookie header that hands out a token, or takes it back if empty.

        Args:
            token: the session's.
            max_age: of this session's cookie; None for the application's.
        """
        if not token:
            age = "; Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT"
            return f'{self.name}=""{self._attributes}{age}{self._flags}'
        seconds = self.max_age if max_age is None else math.ceil(max_age)
        life = "" if seconds is None else f"; Max-Age={seconds}"
        return f"{self.name}={token}{self._attributes}{life}{self._flags}"

    def find(self, headers: Iterable[str]) -> list[str]:
        """Return the tokens in a request's Cookie headers, in their order, each once.

        There may be several: browsers send the cookies of another path or of the domain under the
        same name. At most `TOKENS_MAX` are returned, so that a request costs no more queries.
        """
        found: list[str] = []
        for header in headers:
            if self.name not in header:
                continue
            for part in header.split(";"):
                name, _, value = part.strip(" \t").partition("=")
                if name == self.name and is_token(value) and value not in found:
                    found.append(value)
        if len(found) > 1:
            _observe.warning("pgkv.session.ambiguous_cookie", cookie=self.name, tokens=len(found))
        return found[:TOKENS_MAX]


def _is_text(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def made_private(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the headers of a response that depends on a session: no shared cache keeps it."""
    for name, revise in (("Vary", varying), ("Cache-Control", private)):
        found = [value for each, value in headers if each.lower() == name.lower()]
        headers = [header for header in headers if header[0].lower() != name.lower()]
        headers.append((name, revise(", ".join(found))))
    return headers


def private(cache_control: str) -> str:
    """Return the Cache-Control of such a response."""
    parts = [part.strip() for part in cache_control.split(",") if part.strip()]
    kept = [part for part in parts if not _SHARED.fullmatch(part)]
    if not {"private", "no-store"} & {part.lower() for part in kept}:
        kept.append("private")
    return ", ".join(kept)


def varying(vary: str) -> str:
    """Return the Vary of such a response."""
    parts = [part.strip() for part in vary.split(",") if part.strip()]
    if not {"cookie", "*"} & {part.lower() for part in parts}:
        parts.append("Cookie")
    return ", ".join(parts)
