"""Single operations of a pipeline that the server performs together.

Reads become one `get_many`, writes of different keys one `set_many` or `increment_many`: a statement
costs the server more than a row. They are one transaction either way. What operations on one key return
depends on their order: one on a key that was written before begins a new group, as does any other
kind of operation. A batch that is refused says nothing of its parts, so they are sent singly then.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, TypeAlias

from .._ops.op import Op, Param
from .._sql import Statements
from ..errors import PgkvError

_KIND = attrgetter("statement.prepared_name")


# The places of the operations that each one sent performs; None: it performs itself.
Places: TypeAlias = "list[list[int]] | None"


def merge(sql: Statements | None, ops: Sequence[Op[Any]]) -> tuple[Sequence[Op[Any]], Places]:
    """Return what to send for those operations; without `sql` they are sent singly."""
    if sql is None or len(set(map(_KIND, ops))) == len(ops):
        return ops, None
    merged: list[Op[Any]] = []
    performed: list[list[int]] = []
    groups: dict[tuple[int, Sequence[Param]], list[int]] = {}
    written: set[bytes | None] = set()

    def end_group() -> None:
        # Reads first: of no key that the group wrote before them.
        for (kind, _), places in sorted(groups.items(), key=lambda group: group[0][0]):
            op = ops[places[0]]
            if len(places) > 1:
                op = sql.merged(kind, [ops[place].params for place in places])
            merged.append(op)
            performed.append(places)
        groups.clear()
        written.clear()

    for place, op in enumerate(ops):
        kind = sql.mergeable.get(op.statement.prepared_name)
        if kind is None or op.params[0] in written:
            end_group()
        if kind is None:
            merged.append(op)
            performed.append([place])
            continue
        # Parameters beyond key and value are a ttl: one for the whole batch.
        groups.setdefault((kind, op.params[2:]), []).append(place)
        if op.statement.writes:
            written.add(op.params[0])
    end_group()
    return merged, performed


def parted(performed: Places, ops: Sequence[Op[Any]], answers: list[Any]) -> list[Any]:
    """Return each operation's own answer."""
    if performed is None:
        return answers
    own: list[Any] = [None] * len(ops)
    for places, answer in zip(performed, answers, strict=True):
        alone = len(places) == 1 or isinstance(answer, PgkvError)
        for place in places:
            own[place] = answer if alone else answer.get(ops[place].params[0])
    return own
