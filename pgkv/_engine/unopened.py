"""What a call returns that has still to be opened, and is easily taken for what it opens:
``tx = store.transaction()``, then ``tx.get("k")``. Such mistakes get an error that says what to
write; how a thing opens is its own business.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .._observe import shown

T = TypeVar("T")


class Unopened:
    """An object that must be entered before it is used.

    Args:
        call: the call that created it.
        write: the code to write instead, for the message.
        how: it is opened.
    """

    def __init__(self, call: str, write: str, how: str = "entered") -> None:
        self._call = call
        self._write = write
        self._how = how

    @shown
    def __repr__(self) -> str:
        return f"{self._call}, to be {self._how}"

    if not TYPE_CHECKING:  # a type checker knows that there is no such attribute

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_"):
                raise AttributeError(name)
            # Only asked for what is not there: it was taken for what it opens.
            raise AttributeError(
                f"{self._call} has to be {self._how} before .{name}: write {self._write}"
            )


class Unawaited(Unopened, Coroutine[Any, Any, T]):
    """Something to be awaited once, or entered with ``async with``.

    It is a coroutine, so that ``asyncio.run``, ``create_task`` and ``run_coroutine_threadsafe``
    accept it. A subclass says in `_open` what awaiting it does.
    """

    def __init__(self, call: str, write: str) -> None:
        super().__init__(call, write, "awaited or entered")
        self.__name__ = self.__qualname__ = call  # what the repr of a task shows
        self._used = False
        self._coroutine: Coroutine[Any, Any, T] | None = None

    @abstractmethod
    async def _open(self) -> T: ...

    def _use(self) -> None:
        """Count the one use; `__aenter__` of a subclass calls it too."""
        if self._used:
            raise RuntimeError(f"{self._call} was awaited or entered already; call it again")
        self._used = True

    def _opening(self) -> Coroutine[Any, Any, T]:
        if self._coroutine is None:
            self._use()
            self._coroutine = self._open()
        return self._coroutine

    def __await__(self) -> Generator[Any, Any, T]:
        self._use()
        self._coroutine = self._open()
        return self._coroutine.__await__()

    def send(self, value: Any, /) -> Any:
        """Run to the next ``await``, as of any coroutine."""
        return self._opening().send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an exception inside, as of any coroutine."""
        return self._opening().throw(*error)

    def close(self) -> None:
        """End it, as of any coroutine."""
        if self._coroutine is not None:
            self._coroutine.close()

    if not TYPE_CHECKING:  # nor a method for `with`

        def __enter__(self) -> NoReturn:
            raise TypeError(f"write `async with {self._call} as ...`, not `with`")

        def __exit__(self, *_: object) -> None:
            pass  # `with` looks for it before it calls __enter__
