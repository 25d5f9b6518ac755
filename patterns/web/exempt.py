"""Which requests middleware lets pass: those of some paths, or those that a function names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeAlias

from ...errors import ConfigError

Exempt: TypeAlias = "Collection[str] | Callable[[Any], Any] | None"


def under(paths: Collection[str]) -> Callable[[str], bool]:
    """Return the question "is this path one of those, or below one?".

    Raises:
        ConfigError: they are no paths. (A single string would be a collection of letters.)
    """
    given: object = paths
    if isinstance(given, str) or not isinstance(given, Iterable) or not all(map(_is_path, given)):
        raise ConfigError(
            f"exempt must be a function, or a list of paths that begin with /, not {paths!r}"
        )
    exact = frozenset(each.rstrip("/") or "/" for each in paths)
    below = tuple(each.rstrip("/") + "/" for each in paths)
    return lambda path: path in exact or path.startswith(below)


def exemption(exempt: Exempt) -> Callable[[Any, str], bool]:
    """Return the question "does this request need no session?", of a request and its path.

    Args:
        exempt: a function of the ASGI scope or WSGI environ; or paths, as of `under`; or None.

    Raises:
        ConfigError: neither of these.
    """
    if exempt is None:
        return lambda _request, _path: False
    if callable(exempt):
        ask = exempt
        return lambda request, _path: bool(ask(request))
    is_under = under(exempt)
    return lambda _request, path: is_under(path)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value.startswith("/")
