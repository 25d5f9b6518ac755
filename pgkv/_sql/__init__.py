"""Every statement pgkv sends, as factories that return operations. It never opens a connection.

One module per shape of work: `table` holds the pieces that statements share, `point` what touches
one key, `batch` what touches many, `scan` what touches a range or the whole table. The rules that
keep one text running on PostgreSQL 14 to 18, managed PostgreSQL and Citus:

* In an upsert the clock stands in the INSERT list only, and ON CONFLICT reads it as
  ``EXCLUDED.updated_at``: Citus refuses any function there that is not IMMUTABLE.
* SELECT, UPDATE and DELETE judge time by ``statement_timestamp()``: unlike ``now()`` it moves
  inside a long transaction, unlike ``clock_timestamp()`` it is STABLE.
* Both stay unqualified, so that a test's ``search_path`` can put a clock of its own before them.
* Whatever orders or ranges over keys says ``COLLATE "C"``: tables made by others may have the
  database's collation, under which ``'a' <= key`` means something else.
* Several rows are locked in key order before they are changed, or two batches deadlock.
"""

from .batch import BatchStatements
from .point import Point
from .scan import Scan

__all__ = ["Statements"]


class Statements(Point, BatchStatements, Scan):
    """All statements of one key-value table, for keys under one prefix."""
