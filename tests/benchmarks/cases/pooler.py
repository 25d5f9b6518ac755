"""A get through PgBouncer in transaction mode, where a version is installed that keeps prepared statements."""

from __future__ import annotations

from itertools import cycle

import pgkv
from tests import pgbouncer
from tests.benchmarks.case import KEYS, PGKV, Bench, Entrants, case, each, filled
from tests.benchmarks.placement import children

DIRECT = "pgkv, no pooler"


@case("get through PgBouncer", {DIRECT: (1.9, 1.4)})
def get(bench: Bench) -> Entrants:
    yield DIRECT, each(bench.store().get, cycle(KEYS))
    if "newer" in pgbouncer.programs():
        before = children()
        settings = "pool_mode = transaction", "max_prepared_statements = 200"
        dsn = bench.enter(pgbouncer.started(bench.dsn, *settings, program="newer"))
        bench.more_pids |= children() - before
        yield (
            PGKV,
            each(
                bench.enter(filled(pgkv.Store.connect(dsn, pooler=pgkv.Pooler.TRANSACTION))).get,
                cycle(KEYS),
            ),
        )
