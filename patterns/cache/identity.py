"""Which function a name stands for: two functions under one name would share their entries.

A definition is what can be seen of a function: its code, and what it was made with (the variables
that it closes over, the defaults of its parameters). One function may be decorated twice, code that
runs again (a module that is reloaded, a notebook's cell) may define its functions again, and so may
a function that defines one when the earlier one is gone: what they close over is part of their keys.
Any other function under a name that is taken is refused.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any, NamedTuple

from ..._fork import new_lock
from .key import PLAIN_TYPES, Unencodable, encode

NAMES_MAX = 10_000  # remembered; the one defined longest ago goes
DEPTH_MAX = 5  # functions that close over functions

_definitions: OrderedDict[str, Definition] = OrderedDict()
_lock = new_lock(sys.modules[__name__])


class Definition(NamedTuple):
    """What is known of a function under a name; nothing of it keeps the function alive.

    Attributes:
        fn: the function, as long as it lives.
        code: its code, where it has one.
        parts: what was seen of the function and of the settings that make its keys.
        origin: the code that was running when it was decorated: a module's, if that was at the
            top level or in a class body.
    """

    fn: Callable[[], object]
    code: CodeType | None
    parts: object
    origin: CodeType


def claim(name: str, parts: tuple[Any, ...], fn: Callable[..., Any], frame: FrameType) -> None:
    """Give a name to a function.

    Args:
        name: what its entries are kept under.
        parts: the function and what else makes its keys.
        fn: the function.
        frame: where it is decorated.

    Raises:
        TypeError: another function has the name.
    """
    new = Definition(
        weakref.ref(fn), getattr(fn, "__code__", None), _seen(parts, DEPTH_MAX), _origin(fn, frame)
    )
    with _lock:
        old = _definitions.get(name)
        if old is not None and not _may_follow(old, new):
            gc.collect()  # the other one, or what it closes over, may be garbage
            if not _may_follow(old, new):
                raise TypeError(
                    f"cached {fn.__qualname__}(): another function is cached as {name!r}, and the "
                    "two would share their entries. Give each its own name with name='...'; for "
                    "functions made in a loop or by another function, with what they differ by"
                )
        _definitions[name] = new
        _definitions.move_to_end(name)
        if len(_definitions) > NAMES_MAX:
            _definitions.popitem(last=False)


def _may_follow(old: Definition, new: Definition) -> bool:
    ran_again = old.origin is not new.origin and old.origin.co_qualname == new.origin.co_qualname
    made_again = old.code is not None and old.code == new.code and old.fn() is None
    return ran_again or made_again or old.parts == new.parts


def _origin(fn: Callable[..., Any], frame: FrameType) -> CodeType:
    """The code in which the function is defined, rather than that of a decorator around ours."""
    scope = getattr(fn, "__globals__", None)
    found: FrameType | None = frame
    while found is not None and found.f_globals is not scope:
        found = found.f_back
    found = found or frame
    outer: FrameType | None = found
    while outer is not None and outer.f_globals is found.f_globals:
        if outer.f_code.co_name == "<module>":
            return outer.f_code
        outer = outer.f_back
    return found.f_code


def _seen(value: Any, depth: int) -> object:
    """What tells a value from another one, without a reference to it."""
    if isinstance(value, tuple):
        return tuple(_seen(each, depth) for each in value)
    if isinstance(value, FunctionType) and depth:
        inner = [_cell(each) for each in value.__closure__ or ()]
        made_with = (*inner, value.__defaults__ or (), *(value.__kwdefaults__ or {}).values())
        name = f"{value.__module__}.{value.__qualname__}"
        return (name, value.__code__, _seen(made_with, depth - 1))
    if isinstance(value, MethodType) and depth:
        return (_seen(value.__self__, depth - 1), _seen(value.__func__, depth - 1))
    if not isinstance(value, type):
        try:
            return encode(value)
        except (Unencodable, AttributeError, TypeError, ValueError):
            pass
    return id(value)  # it lives as long as the function does, and then nothing compares with it


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY  # not assigned yet


_EMPTY = "a variable that is not assigned yet"


def closed_over(fn: Any, depth: int = DEPTH_MAX) -> bytes:
    """Encode the plain values that a function closes over, and the names of the functions. Without
    them, functions that one piece of code defines one after the other would share their entries."""
    cells = getattr(fn, "__closure__", None)
    if not cells or not depth:
        return b""
    return b"V" + b"".join(_captured(_cell(each), depth - 1) for each in cells)


def _captured(value: Any, depth: int) -> bytes:
    if isinstance(value, FunctionType):
        return encode(f"{value.__module__}.{value.__qualname__}") + closed_over(value, depth)
    if type(value) in PLAIN_TYPES or isinstance(value, tuple | Enum):
        try:
            return encode(value)
        except Unencodable:
            pass
    return b"?"
