"""The store's statements, as factories that return operations. Nothing is sent from here.

`table` holds the pieces that statements share, `point` those of one key, `batch` those of many, `scan`
those of a range or the whole table, `sweep` those that collect expired rows of any table, `evict`
those that keep a table within its bound. Patterns have
their own statements, in their `sql` modules. The rules that keep one text running on PostgreSQL 14 to
18, managed PostgreSQL and Citus:

* In an upsert the clock stands in the INSERT list only, and ON CONFLICT reads it as
  ``EXCLUDED.updated_at``: Citus refuses any function there that is not IMMUTABLE.
* SELECT, UPDATE and DELETE judge time by ``statement_timestamp()``: unlike ``now()`` it moves
  inside a long transaction, unlike ``clock_timestamp()`` it is STABLE.
* Both stay unqualified, so that a test can put its own clock before them in the ``search_path``.
* An order or a range of keys is written with ``COLLATE "C"``: a table made by another program may
  have the database's collation, under which ``'a' <= key`` means something else.
* Several rows are locked in key order before they are changed; otherwise two batches deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._ops.lazy import cached_property
from .._ops.op import Op, Param, Statement
from .batch import BatchStatements
from .evict import EvictStatements
from .point import PointStatements
from .scan import ScanStatements
from .table import AFTER, NEVER

if TYPE_CHECKING:
    from ..config import Config
    from ..transforms import Transforms

__all__ = ["Statements"]

GETS, SETS, INCREMENTS = range(3)


class Statements(PointStatements, BatchStatements, ScanStatements, EvictStatements):
    """All statements of one key-value table, for keys under one prefix."""

    may_miss = True
    transforms: Transforms | None = None

    @classmethod
    def of(cls, config: Config, prefix: str = "") -> Statements:
        """Return the statements of another table, which may have transforms, or prefix."""
        if not config.transforms:
            return cls(config, prefix)
        from .transformed import TransformedStatements

        return TransformedStatements(config, prefix)

    @cached_property
    def mergeable(self) -> dict[bytes, int]:
        """The statements of one key of which several can be one of many, by their prepared names,
        which are also those of other views of the table; in the order of what they become."""
        kinds: dict[Statement[Any], int] = {
            self.get_statement: GETS,
            self.set_statement: SETS,
            self.shaped(self._make_set, AFTER): SETS,
            self.increment_statement: INCREMENTS,
        }
        return {statement.prepared_name: kind for statement, kind in kinds.items()}

    def merged(self, kind: int, params: Sequence[Sequence[Param]]) -> Op[dict[bytes, Any]]:
        """Operations of one of these kinds as one; its answer has theirs by key, but for None."""
        if kind == GETS:
            return self.get_raw({key for (key,) in params if key is not None})
        if kind == SETS:
            return self.merged_set(NEVER if len(params[0]) == 2 else AFTER, params)
        return self.merged_increment(params)
