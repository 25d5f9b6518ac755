"""Which function a name stands for: two functions under one name would share their entries.

What a function was made with (the variables that it closes over, the defaults of its parameters) is
part of its keys where it cannot change; other objects are only compared. A name may be taken again
by the same function, by code that runs again (a module that is reloaded, a notebook's cell), and by
the function that the same code defines when the earlier one is gone, if their keys tell the two
apart or they were made with the same objects. Any other function is refused.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from ..._fork import new_lock
from .function import AsyncCachedFunction, CachedFunction
from .key import PLAIN_TYPES, Unencodable, encode, is_importable, signature_of

NAMES_MAX = 10_000  # remembered; the one defined longest ago goes

_definitions: OrderedDict[str, Definition] = OrderedDict()
_lock = new_lock(sys.modules[__name__])


class Definition:
    """What tells a function from another one; nothing of it keeps the function alive. `captured` is
    what it closes over, encoded as far as that cannot change: a part of its keys."""

    def __init__(
        self,
        fn: Callable[..., Any],
        key: Callable[..., Any] | None,
        ignore: tuple[str, ...],
        frame: FrameType,
    ) -> None:
        self.fns: list[Any] = [_reference(each) for each in (fn, key) if each is not None]
        self.origin: CodeType = _origin(fn, frame)
        self.codes: list[CodeType] = []
        self.objects: list[tuple[str, Any]] = []  # what keys cannot hold: variable, reference
        self._met: list[Any] = []
        self._own = {id(fn)}  # the defaults of its parameters are arguments
        wrapped: Any = fn
        while (wrapped := getattr(wrapped, "__wrapped__", None)) is not None:
            self._own.add(id(wrapped))
        self.captured: bytes = self._cells(fn)
        if key is not None:
            self.captured += self._cells(key)
        self.made_with: bytes = self.captured + repr(ignore).encode()
        for each in signature_of(fn).parameters.values():
            if each.default is not each.empty:
                encoded = _encoded(each.default)
                self.made_with += encoded or b"?"
                counts = (
                    key is None and each.name not in ignore and type(each.default) is not object
                )
                if encoded is None and counts:
                    self.objects.append((each.name, _reference(each.default)))
        del self._met, self._own  # they hold what they met

    def _cells(self, fn: Any) -> bytes:
        if (code := getattr(fn, "__code__", None)) is not None:
            self.codes.append(code)
        if not isinstance(fn, FunctionType):
            return b"V" + self._add("the function itself", fn)
        self._met.append(fn)
        cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        parts = [self._cell(name, cell, fn) for name, cell in cells]
        return b"V" + b"".join(parts) if parts else b""

    def _cell(self, name: str, cell: Any, fn: FunctionType) -> bytes:
        try:
            return self._add(name, cell.cell_contents)
        except ValueError:  # not assigned yet
            if name != fn.__name__:  # the function itself, which calls itself
                self.objects.append((name, _reference(cell)))
            return b"?"

    def _add(self, name: str, value: Any) -> bytes:
        if isinstance(value, MethodType):
            return b"W" + self._add(name, value.__self__) + self._add(name, value.__func__)
        if isinstance(value, functools.partial):
            parts = (value.func, *value.args, *value.keywords, *value.keywords.values())
            return b"P" + self._add(name, parts)
        if type(value) is tuple:
            return b"t%d:" % len(value) + b"".join(self._add(name, each) for each in value)
        if isinstance(value, CachedFunction | AsyncCachedFunction) and not value._head:
            value = value.__wrapped__
        if isinstance(value, FunctionType) and not is_importable(value):
            if (
                at := next((n for n, each in enumerate(self._met) if each is value), None)
            ) is not None:
                return b"R%d;" % at
            made_of = encode(f"{value.__module__}.{value.__qualname__}") + self._cells(value)
            if id(value) in self._own:
                return made_of
            defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            return made_of + self._add(name, defaults)
        encoded = _encoded(value) if _is_constant(value) else None
        if encoded is None:
            self.objects.append((name, _reference(value)))
        return encoded or b"?"

    def may_follow(self, old: Definition, *, named: bool) -> bool:
        """Whether this one may have the name that `old` has. With ``name=`` it is the program that
        says for which functions a name stands, once the earlier one is gone."""
        same_text = bool(old.codes) and list(map(id, old.codes)) == list(map(id, self.codes))
        same_place = old.origin.co_qualname == self.origin.co_qualname
        if old.origin is not self.origin and same_place and not same_text:
            return True  # all of it ran again, maybe edited
        if old.codes != self.codes:
            return False
        is_alive = all(isinstance(each, weakref.ref) and each() is not None for each in old.fns)
        if not is_alive and named and self.codes:
            return True
        pairs = zip(old.objects, self.objects, strict=False)
        return (
            (old.made_with == self.made_with or (not is_alive and bool(self.codes)))
            and len(old.objects) == len(self.objects)
            and all(_is_same(one[1], two[1], is_alive) for one, two in pairs)
        )


def claim(name: str, new: Definition, who: str, *, named: bool) -> None:
    """Give a name to a function, or raise TypeError where another one has it. `named`: it is the
    program's choice."""
    with _lock:
        old = _definitions.get(name)
        if old is not None and not new.may_follow(old, named=named):
            gc.collect()  # the other one, or what it closes over, may be garbage
            if not new.may_follow(old, named=named):
                raise TypeError(f"cached {who}(): {_refusal(name, old, new)}")
        _definitions[name] = new
        _definitions.move_to_end(name)
        if len(_definitions) > NAMES_MAX:
            _definitions.popitem(last=False)


def _refusal(name: str, old: Definition, new: Definition) -> str:
    if new.objects and old.codes == new.codes:
        held = ", ".join(dict.fromkeys(variable for variable, _ in new.objects))
        return (
            f"another function is cached as {name!r}, or was, and their keys cannot tell the two "
            f"apart: what they were made with is no plain value ({held}). Give each its own name "
            "with name='...', with what they differ by; or make that a parameter"
        )
    return (
        f"another function is cached as {name!r}, and the two would share their entries. Give each "
        "its own name with name='...'; for functions made in a loop or by another function, with "
        "what they differ by"
    )


def _origin(fn: Callable[..., Any], frame: FrameType) -> CodeType:
    """The code in which the function is defined, rather than that of a decorator around ours: a
    module's, if that is at the top level or in a class body."""
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


def _reference(value: object) -> Any:
    try:
        return weakref.ref(value)
    except TypeError:
        return id(value)  # it means nothing once the function is gone


def _is_same(one: Any, two: Any, is_alive: bool) -> bool:
    if isinstance(one, int):
        return is_alive and bool(one == two)
    return isinstance(two, weakref.ref) and one() is not None and one() is two()


def _is_constant(value: Any) -> bool:
    """Whether a value cannot change, or says of itself what of it counts."""
    if isinstance(value, tuple | frozenset):
        return all(map(_is_constant, value))
    if isinstance(value, ModuleType):
        return sys.modules.get(value.__name__) is value
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return is_importable(value)
    kind = type(value)
    return (
        (kind in PLAIN_TYPES and kind is not bytearray)
        or isinstance(value, Enum)
        or hasattr(kind, "__cache_key__")
    )


def _encoded(value: Any) -> bytes | None:
    if isinstance(value, ModuleType):
        return b"H" + encode(value.__name__)
    try:
        return encode(value)
    except (Unencodable, AttributeError, TypeError, ValueError):
        return None
