"""For Alembic: `include_object`, so that autogenerate leaves pgkv's tables alone, and operations that
make and drop them in a migration.

::

    # env.py
    from pgkv.integrations.alembic import include_object
    context.configure(..., include_object=include_object("kv_store"))

    # a migration
    import pgkv.integrations.alembic
    def upgrade(): op.create_pgkv_tables("kv_store")
    def downgrade(): op.drop_pgkv_tables("kv_store")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from alembic.operations import MigrateOperation, Operations

from ..config import Config
from ..patterns.schema import schema_sql, tables

__all__ = ["PgkvTablesOp", "include_object"]

_PARTS = inspect.signature(schema_sql).parameters.keys() - {"config"}
IncludeObject = Callable[[Any, Any, str, bool, Any], bool]


def _config(table_name: str, schema: str | None, options: dict[str, Any]) -> Config:
    return Config("postgresql://", table_name=table_name, schema=schema, **options)


def include_object(
    *table_names: str, schema: str | None = None, then: IncludeObject | None = None
) -> IncludeObject:
    """Return Alembic's ``include_object``, which leaves out the tables of pgkv and their indexes.

    Args:
        table_names: the ``table_name`` of each store; the tables of the patterns go with it.
        schema: their schema; None for the default one.
        then: the ``include_object`` that judges all other objects.
    """
    ours = {
        table.name
        for name in table_names or ("kv_store",)
        for table in tables(_config(name, schema, {}))
    }

    def include(found: Any, name: str | None, kind: str, reflected: bool, other: Any) -> bool:
        table = found if kind == "table" else getattr(found, "table", None)
        if table is not None and table.name in ours and table.schema == schema:
            return False
        return then is None or then(found, name, kind, reflected, other)

    return include


@Operations.register_operation("create_pgkv_tables")
@Operations.register_operation("drop_pgkv_tables", "drop")
class PgkvTablesOp(MigrateOperation):
    """Makes or drops a store's tables.

    Args:
        table_name: the store's.
        schema: its schema.
        drop: drop them.
        options: fields of `Config` such as ``table_type``, and those of `pgkv.schema_sql`.
    """

    def __init__(self, table_name: str, schema: str | None, drop: bool, options: Any) -> None:
        self.table_name = table_name
        self.schema = schema
        self.is_drop = drop
        self.options = options

    @classmethod
    def create_pgkv_tables(
        cls,
        operations: Operations,
        table_name: str = "kv_store",
        schema: str | None = None,
        **options: Any,
    ) -> None:
        """Make the tables that are missing: ``op.create_pgkv_tables("kv_store")``."""
        operations.invoke(cls(table_name, schema, False, options))

    @classmethod
    def drop(
        cls,
        operations: Operations,
        table_name: str = "kv_store",
        schema: str | None = None,
        **options: Any,
    ) -> None:
        """Drop the tables with all they hold: ``op.drop_pgkv_tables("kv_store")``."""
        operations.invoke(cls(table_name, schema, True, options))

    def reverse(self) -> PgkvTablesOp:
        """Return the operation that undoes this one."""
        return PgkvTablesOp(self.table_name, self.schema, not self.is_drop, self.options)

    def sql(self) -> str:
        """Return the statements."""
        parts = {name: value for name, value in self.options.items() if name in _PARTS}
        fields = {name: value for name, value in self.options.items() if name not in _PARTS}
        config = _config(self.table_name, self.schema, fields)
        if not self.is_drop:
            return schema_sql(config, **parts)
        names = ", ".join(table.quoted for table in tables(config, **parts))
        return f"DROP TABLE IF EXISTS {names}"


@Operations.implementation_for(PgkvTablesOp)
def _execute(operations: Operations, operation: PgkvTablesOp) -> None:
    operations.execute(operation.sql())
