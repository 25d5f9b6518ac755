"""A request as middleware sees it, the same for ASGI and WSGI: its names, its path within the
application, and whether it is exempt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from ...errors import ConfigError

Exempt: TypeAlias = "Collection[str] | Callable[[Any], Any] | None"


class HttpRequest(Mapping[str, Any]):
    """A request as key functions see it, the same for ASGI and WSGI.

    It is the scope or environ itself (``request["path"]``), with attributes for common values.

    Attributes:
        scope: the ASGI scope or WSGI environ.
        method: such as ``"GET"``; ``"WEBSOCKET"`` for a handshake.
        path: the decoded path within the application, without the query.
        client: the peer's address as the server gives it, or None. See `client_ip`.
    """

    __slots__ = ("_headers", "client", "method", "path", "scope")

    def __init__(self, scope: Mapping[str, Any]) -> None:
        self.scope: Mapping[str, Any] = scope
        self._headers: dict[str, str] | None = None
        self.path: str = path_of(scope)
        if "wsgi.version" in scope:
            self.method: str = scope["REQUEST_METHOD"]
            self.client: str | None = scope.get("REMOTE_ADDR") or None
        else:
            self.method = scope.get("method", "WEBSOCKET")
            peer = scope.get("client")
            self.client = peer[0] if peer else None

    @property
    def headers(self) -> Mapping[str, str]:
        """The request's headers by lower-case name; repeated ones are joined by commas."""
        if self._headers is None:
            self._headers = {}
            for name, value in self._pairs():
                known = self._headers.get(name)
                self._headers[name] = value if known is None else f"{known},{value}"
        return self._headers

    def _pairs(self) -> Iterator[tuple[str, str]]:
        if "wsgi.version" not in self.scope:
            for name, value in self.scope["headers"]:
                yield name.decode("latin-1").lower(), value.decode("latin-1")
            return
        for name, value in self.scope.items():
            if name.startswith("HTTP_"):
                yield name[5:].replace("_", "-").lower(), value
            elif name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
                yield name.replace("_", "-").lower(), value

    def __getitem__(self, name: str) -> Any:
        return self.scope[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scope)

    def __len__(self) -> int:
        return len(self.scope)


def scope_of(request: Any) -> Any:
    """Return the ASGI scope or WSGI environ of a request of any framework."""
    for name in ("scope", "environ"):
        found = getattr(request, name, None)
        if found is not None:
            return found
    return request


def path_of(scope: Mapping[str, Any]) -> str:
    """Return the path of a request within its application, decoded: without the prefix at which a
    proxy or another application mounts it."""
    if "wsgi.version" in scope:
        path: str = scope.get("PATH_INFO", "").encode("latin-1").decode("utf-8", "replace")
        return path or "/"
    path = scope["path"]
    prefix = (scope.get("root_path") or "").rstrip("/")
    # Servers that follow an older text of ASGI leave the prefix out of the path.
    inside = path.removeprefix(prefix)
    return (inside or "/") if inside[:1] in ("/", "") else path


def exemption(exempt: Exempt) -> Callable[[Any, str], bool]:
    """Return the question "is this request exempt?", of a request and its path."""
    if exempt is None:
        return lambda _request, _path: False
    if callable(exempt):
        ask = exempt
        return lambda request, _path: bool(ask(request))
    given: object = exempt
    if isinstance(given, str) or not isinstance(given, Iterable) or not all(map(_is_path, given)):
        raise ConfigError(
            f"exempt must be a function, or a list of paths that begin with /, not {exempt!r}"
        )
    exact = frozenset(each.rstrip("/") or "/" for each in exempt)
    below = tuple(each.rstrip("/") + "/" for each in exempt)
    return lambda _request, path: path in exact or path.startswith(below)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value.startswith("/")
