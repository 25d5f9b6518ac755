"""What a call returns that has still to be opened, and is easily taken for what it opens:
``tx = store.transaction()``, then ``tx.get("k")``. Such mistakes get an error that says what to
write; how a thing opens is its own business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from .._observe import shown


class Unopened:
    """Something to be entered.

    Args:
        call: what made it.
        write: what to write instead of using it as it is.
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


class Unawaited(Unopened):
    """Something to be awaited, or entered with ``async with``."""

    def __init__(self, call: str, write: str) -> None:
        super().__init__(call, write, "awaited or entered")

    if not TYPE_CHECKING:  # nor a method for `with`

        def __enter__(self) -> NoReturn:
            raise TypeError(f"write `async with {self._call} as ...`, not `with`")

        def __exit__(self, *_: object) -> None:
            pass  # `with` looks for it before it calls __enter__
