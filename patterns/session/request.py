"""The session as a request sees it: a dict that knows whether it was read, and can load itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ...errors import SessionError
from .data import KEEP, Session


class RequestSession(dict[str, Any]):
    """`request.session`, ``environ["pgkv.session"]`` and ``flask.session``: the session's data.

    Any dict will do where this is expected. `session` is the `Session` behind it, for
    ``sessions.rotate(...)`` and its fellows, which take this object as well.

    One thing looks past all this: ``json.dumps`` of a dict that nothing has touched yet (WSGI and
    Flask) writes ``{}``; give it ``dict(session)``.

    `clear` ends the session: what is put in afterwards goes into a new one, under a new token. So
    a program that clears before a login is safe from session fixation without knowing of it.
    """

    def __init__(self, prepare: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._prepare = prepare  # loads, or refuses; called before the first use
        self._session: Session | None = None
        self.accessed: bool = False  # the response depends on the session
        self.modified: bool = False  # something was put in or taken out
        self.cleared: bool = False
        self.lifetimes: tuple[Any, Any] = (KEEP, KEEP)  # idle and absolute, for the next save

    def fill(self, session: Session) -> None:
        super().clear()
        super().update(session.data)
        session.data = self
        self._session = session
        self._prepare = None

    @property
    def is_loaded(self) -> bool:
        return self._session is not None

    @property
    def session(self) -> Session:
        """The session behind it, loaded if need be."""
        self.mark_accessed()
        assert self._session is not None
        return self._session

    def mark_accessed(self) -> None:
        """Note that the response depends on it (Starlette calls this too), and load it."""
        self.accessed = True
        if self._prepare is not None:
            self._prepare()
            if self._session is None:
                raise SessionError("the session was not loaded")

    def mark_modified(self) -> None:
        """Note that the program changes it, and load it."""
        self.mark_accessed()
        self.modified = True

    def as_json(self) -> dict[str, Any]:
        """Return what is stored of it."""
        return self

    __hash__ = None  # as every dict

    # The methods of dict that are not here load the session first too: see below the class.

    def __or__(self, other: Any) -> Any:
        return dict(self.items()) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self.items())

    def __repr__(self) -> str:
        # Sessions end up in tracebacks and logs; what they hold must not. Looking loads nothing.
        return f"<{type(self).__name__} {'not loaded' if self._session is None else self._session}>"

    def copy(self) -> dict[str, Any]:
        """Return a plain dict."""
        return dict(self.items())

    def get(self, key: str, default: Any = None) -> Any:
        self.mark_accessed()
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.mark_accessed()
        self.modified |= super().__contains__(key)
        return super().pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        self.mark_accessed()
        self.modified |= not super().__contains__(key)
        return super().setdefault(key, default)

    def clear(self) -> None:
        """End the session. What is put in afterwards begins a new one."""
        self.mark_modified()
        self.cleared = True
        self.lifetimes = (KEEP, KEEP)
        super().clear()


def _loading(mark: str, *names: str) -> None:
    """Have methods of dict call `mark` first. Views and iterators are those of a loaded one."""
    for name in names:
        setattr(RequestSession, name, _marked(mark, getattr(dict, name)))


def _marked(mark: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def marked(self: RequestSession, *args: Any, **kwargs: Any) -> Any:
        getattr(self, mark)()
        return method(self, *args, **kwargs)

    return marked


_loading(
    "mark_accessed", "__contains__", "__eq__", "__getitem__", "__iter__", "__len__", "__ne__",
    "__reversed__", "items", "keys", "values",
)  # fmt: skip
_loading("mark_modified", "__delitem__", "__ior__", "__setitem__", "popitem", "update")
