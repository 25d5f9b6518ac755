"""One test for many things of one kind, where a test for each costs far more than the check itself:
every process of a run collects them all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

T = TypeVar("T")


def for_each(
    things: Collection[T], name: Callable[[T], str] = str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The test checks each of the things, its first parameter, and fails with all that fail, by name. Its
    other parameters are fixtures.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            assert things, "there is nothing to check"
            wrong: list[Exception] = []
            for thing in things:
                try:
                    test(thing, **fixtures)
                except Exception as error:
                    error.add_note(name(thing))
                    wrong.append(error)
            if wrong:
                raise ExceptionGroup(f"{len(wrong)} of {len(things)}", wrong)

        signature = inspect.signature(test)
        others = [*signature.parameters.values()][1:]
        run.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]  # pytest reads it
        return run

    return decorate
