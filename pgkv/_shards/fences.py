"""On Citus: what a slot's statements become at the node that owns the slot.

Citus' own way from a table's name to its rows costs a write several times its work, and refuses some
statements. So what writes goes to the shard's relation. Before it, in the same implicit transaction, goes
a fence: a function that takes the lock which a move of the slot needs, and refuses where the slot is not.
A plain read keeps the table's name: Citus forwards it where a route is old.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

from .._ops.codec import encode_int8
from .._ops.op import Op, Statement
from ..errors import TableNotFoundError
from .sql import FENCE, Relation, is_plain_read

PLANS_MAX = 50_000

_NAME = r'"pgkv_[0-9]{2,}"\."(?:[^"]|"")+"'
# In a literal only what names a relation: in a payload the table's name is a word.
_TABLE = re.compile(rf"(?<!'){_NAME}|(?<='){_NAME}(?='::regclass)")


class Plan(NamedTuple):
    """What is sent for a statement: the fence, and then another statement.

    Attributes:
        renamed: the table's name and the relation's, where a parameter has it.
        plain: outside a transaction the statement itself is sent, by the table's name.
    """

    fence: Op[None]
    statement: Statement[Any]
    plain: bool
    renamed: tuple[bytes, bytes] | None

    def of(self, op: Op[Any]) -> Op[Any]:
        """The operation as it is sent."""
        params = op.params
        if self.renamed is not None:
            old, new = self.renamed
            params = [new if param == old else param for param in params]
        return Op(self.statement, params)


class Fences:
    """The relations of all slots' tables, as a process knows them."""

    def __init__(self) -> None:
        self._relations: dict[str, Relation] = {}
        self._plans: dict[Statement[Any], Plan | None] = {}

    def __contains__(self, table: str) -> bool:
        """Whether a table, by its quoted name, is known."""
        return table in self._relations

    def learn(self, relations: dict[str, Relation]) -> bool:
        """Take over what the metadata say; whether that is new."""
        if relations == self._relations:
            return False
        self._relations, self._plans = relations, {}
        return True

    def plan(self, statement: Statement[Any]) -> Plan | None:
        """How a statement is sent; None for one that is sent as it is.

        Raises:
            TableNotFoundError: the metadata, as they were read last, do not have the table.
        """
        try:
            return self._plans[statement]
        except KeyError:
            pass
        plans = self._plans
        if len(plans) >= PLANS_MAX:
            plans.clear()
        found = plans[statement] = self._made(statement)
        return found

    def _made(self, statement: Statement[Any]) -> Plan | None:
        text, table = statement.sql, statement.table
        names = set(_TABLE.findall(text))
        by_name = "to_regclass($1)" in text
        assert table is not None
        # Citus hides the relations of shards from those who read pg_class.
        if statement.script or not (names or by_name) or "pg_class" in text:
            return None
        own = self._relation(table.quoted, statement)

        def relation(match: re.Match[str]) -> str:
            return self._relation(match[0], statement).name

        made = replace(
            statement,
            sql=_TABLE.sub(relation, text),
            sql_18=statement.sql_18 and _TABLE.sub(relation, statement.sql_18),
            table=replace(table, fences=None),
        )
        renamed = (table.quoted.encode(), own.name.encode()) if by_name else None
        plain = len(names) == 1 and is_plain_read(text)
        return Plan(Op(FENCE, (encode_int8(own.shard),)), made, plain, renamed)

    def _relation(self, quoted: str, statement: Statement[Any]) -> Relation:
        found = self._relations.get(quoted.replace("''", "'"))
        if found is None:
            error = TableNotFoundError(
                f"{statement.name}: the table {quoted} does not exist; call create_table(), or run "
                "`pgkv shards init` again"
            )
            error._table = statement.table.quoted if statement.table else ""
            raise error
        return found
