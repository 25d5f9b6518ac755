"""``pgkv cache``: the entries of cached functions in the table, their hit ratios, and clearing them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import msgspec
import typer

from ..errors import NotFoundError
from . import console
from .command import DONE, Invocation, option

if TYPE_CHECKING:
    from ..patterns.cache.sql import CacheStatements, Usage
    from ..store import Store

_REPORT = dict[str, tuple[int, int]]  # hits and misses by function


def cache(
    call: Invocation,
    clear: str | None = option("--clear FUNCTION", "Invalidate all entries of this function."),
    tag: str | None = option("--tag TAG", "Invalidate all entries with this tag."),
) -> int:
    """List cached functions with their entries, or clear one function or tag.

    Name a function as the list shows it: module, qualified name and version. The last part is
    enough if it is unambiguous. Clearing takes effect in every process at once (in first levels
    within their ttl) and costs one write, however many entries there are. Their rows stay in the
    list until they expire. Exit code 1: there is no such function.

    The hit ratio is of the processes that stored a value in the last hour and have lived for a
    minute. Each reports its counts in the table, at most once a minute.

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
        usages, reports = store._execute(sql.usage()), store._execute(sql.reports())
        if clear is not None:
            return _clear(call, store, sql, clear, usages)
    columns: console.Columns = {
        "function": ("function", console.one_line),
        **console.numbers("entries", "computing"),
        "values": ("value_bytes", console.size),
        "hit ratio": ("hit_ratio", lambda n: "" if n is None else f"{n:.1%}"),
    }
    call.show(
        _with_ratios(usages, reports),
        columns,
        "No cached function has entries in this table.",
    )
    return DONE


def _with_ratios(usages: list[Usage], reports: list[bytes]) -> list[dict[str, Any]]:
    """Add what processes have reported; a function without entries may be in a report as well."""
    from ..patterns.cache.sql import Usage

    documents = {each.function: each._asdict() for each in usages}
    totals: dict[str, list[int]] = {}
    for report in reports:
        with contextlib.suppress(msgspec.MsgspecError):  # another program's row
            for name, (hits, misses) in msgspec.json.decode(report, type=_REPORT).items():
                total = totals.setdefault(name, [0, 0, 0])
                for index, count in enumerate((hits, misses, 1)):
                    total[index] += count
    for name in totals.keys() - documents.keys():
        documents[name] = Usage(name, 0, 0, 0)._asdict()
    for name, document in documents.items():
        hits, misses, processes = totals.get(name, (0, 0, 0))
        ratio = hits / (hits + misses) if hits + misses else None
        document |= {"hits": hits, "misses": misses, "processes": processes, "hit_ratio": ratio}
    return [documents[name] for name in sorted(documents)]


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
