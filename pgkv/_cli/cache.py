"""``pgkv cache``: the entries of cached functions in the table, and clearing them.

The command reads the table, not the programs: each program counts its own hits and misses
(``cache_info()``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import NotFoundError
from . import console
from .command import DONE, Invocation

if TYPE_CHECKING:
    from ..patterns.cache.sql import CacheStatements, Usage
    from ..store import Store


def cache(
    call: Invocation,
    clear: Annotated[
        str | None,
        typer.Option(
            "--clear", metavar="FUNCTION", help="Invalidate all entries of this function."
        ),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option("--tag", metavar="TAG", help="Invalidate all entries with this tag."),
    ] = None,
) -> int:
    """List cached functions with their entries, or clear one function or tag.

    Name a function as the list shows it: module, qualified name and version. The last part is
    enough if it is unambiguous. Clearing takes effect in every process at once (in first levels
    within their ttl) and costs one write, however many entries there are. Their rows stay in the
    list until they expire. Exit code 1: there is no such function.

    **Example:** `pgkv cache`

    **Example:** `pgkv cache --clear app.users.load_user:1`

    **Example:** `pgkv cache --tag user:17`
    """
    if clear is not None and tag is not None:
        raise typer.BadParameter("give at most one of --clear and --tag")
    from ..patterns.cache.sql import TAG, CacheStatements

    with call.store() as store:
        sql = CacheStatements(store._config, store._sql.prefix)
        if tag is not None:
            store._execute(sql.bump_tag(sql.cache_key(TAG, tag)))
            call.answer({"cleared": tag, "kind": "tag"}, f"cleared tag {tag}")
            return DONE
        usages = store._execute(sql.usage())
        if clear is not None:
            return _clear(call, store, sql, clear, usages)
    columns: console.Columns = {
        "function": ("function", console.one_line),
        "entries": ("entries", console.number),
        "computing": ("computing", console.number),
        "values": ("value_bytes", console.size),
    }
    call.show(
        [each._asdict() for each in usages],
        columns,
        "No cached function has entries in this table.",
    )
    return DONE


def _clear(
    call: Invocation, store: Store, sql: CacheStatements, wanted: str, usages: list[Usage]
) -> int:
    from ..patterns.cache.sql import FUNCTION

    names = [each.function for each in usages]
    found = [name for name in names if name == wanted] or [
        name for name in names if name.rpartition(":")[0].endswith(f".{wanted}")
    ]
    if not found:
        raise NotFoundError(f"no cached function {wanted!r} has entries in this table")
    if len(found) > 1:
        raise typer.BadParameter(f"{wanted!r} is ambiguous: {', '.join(found)}; give the full name")
    store._execute(sql.bump_function(sql.cache_key(FUNCTION, found[0])))
    call.answer({"cleared": found[0], "kind": "function"}, f"cleared function {found[0]}")
    return DONE
