"""Checks of a pattern's arguments: the kind of store, and callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, TypeAlias, TypeVar

from ...config import Config
from ...errors import ConfigError

T = TypeVar("T")

# What is computed from a decorated function's arguments. By the first two, strict type checkers know
# the parameters of a lambda.
OfArguments: TypeAlias = (
    Callable[Concatenate[Any, ...], T] | Callable[Concatenate[Any, Any, ...], T] | Callable[..., T]
)


def home_of(store: Any, name: str) -> Any:
    """Return the store that has a name's lock or queue: of a sharded one that of the name's slot."""
    find = getattr(store, "_home", None)
    return store if find is None else find(name)


def named(kind: str) -> str:
    return f"{'an' if kind.startswith('A') else 'a'} {kind}"


def require(given: object, wanted: type[Any], who: str, twin: str) -> None:
    """Refuse what is not of the `wanted` class, which `who` needs. `twin` takes its sync or async
    counterpart: for that the message names it."""
    if isinstance(given, wanted):
        return
    is_async = wanted.__name__.startswith("Async")
    other = wanted.__name__.removeprefix("Async") if is_async else f"Async{wanted.__name__}"
    is_other = any(base.__name__ == other for base in type(given).__mro__)
    raise ConfigError(
        f"{who} needs {named(wanted.__name__)}, not {type(given).__name__}"
        + (f"; for {named(other)} there is {twin}" if is_other else "")
    )


def encrypts(config: Config) -> bool:
    """Whether values of that store are encrypted. Loads nothing where there are no transforms."""
    return any(type(each).__name__ == "AesGcmSiv" for each in config.transforms)


def require_plain(config: Config, who: str, what: str) -> None:
    """Refuse a store that encrypts, where the pattern would keep its data in the clear."""
    if encrypts(config):
        raise ConfigError(
            f"{who} does not encrypt {what}, and this store encrypts values: give it "
            "store.table(name, transforms=[])"
        )


def require_callback(fn: object, name: str, who: str, *, blocking: bool) -> None:
    """Refuse a callback that cannot be called, or that is async where it would not be awaited."""
    if fn is None:
        return
    if not callable(fn):
        raise ConfigError(f"{name} must be a function, not {type(fn).__name__}")
    if blocking and inspect.iscoroutinefunction(fn):
        raise ConfigError(f"{name} must not be async here; {named(f'Async{who}')} awaits it")
