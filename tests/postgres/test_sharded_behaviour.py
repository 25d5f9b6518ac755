"""What every store and pattern does, a sharded one does too: their tests, run again over slots.

They run over one server with one slot and with 32, and over three with 32; `make test` runs one in twelve, and
PGKV_TESTS=full all.
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgkv.testing import ServerClock
from tests import FULL, again, sharded
from tests.postgres import (
    test_atomic,
    test_basic,
    test_batch,
    test_cached,
    test_cached_invalidation,
    test_cached_refresh,
    test_expiry,
    test_idempotency,
    test_leader,
    test_lock,
    test_lock_many,
    test_lock_waiting,
    test_queue,
    test_rate_limit,
    test_rate_limit_quotas,
    test_rate_limit_waiting,
    test_scan,
    test_semaphore,
    test_session,
    test_session_lifetimes,
    test_session_races,
    test_session_rotation,
    test_views,
)
from tests.servers import Server, UserServer
from tests.variants import Variant, closing_all

MODULES = (
    *(test_atomic, test_basic, test_batch, test_expiry, test_scan, test_views),
    *(test_lock, test_lock_many, test_lock_waiting, test_semaphore, test_leader, test_queue),
    *(test_rate_limit, test_rate_limit_quotas, test_rate_limit_waiting, test_idempotency),
    *(test_cached, test_cached_invalidation, test_cached_refresh),
    *(test_session, test_session_lifetimes, test_session_races, test_session_rotation),
)
# What looks at the rows of one server from outside, or counts what is sent to one.
OF_ONE_SERVER = {"peer", "witness", "operations", "connect", "dsn", "make_server", "tape", "race"}
NOT_SHARDED = {
    "test_inside_the_stores_own_transaction": "a transaction is in a slot",
    "test_in_the_stores_transaction": "likewise",
    "test_the_wrong_variant_of_store_is_refused": "it names another class",
    "test_work_longer_than_the_ttl": "it renews by hand, not in the slot",
    "test_racing_first_grants_have_one_winner": "new connections to three servers take their time",
    "test_pool_stats": "each server has a pool",
    "test_batches_sort_their_keys": "in each slot",
    "test_time_moves_inside_a_transaction": "a transaction is in a slot",
    "test_a_batch_is_all_or_nothing": "on each server",
    "test_settings_are_checked": "a transaction is in a slot",
    "test_a_put_in_the_stores_transaction": "likewise; see test_sharded",
    "test_notified_takers_wake": "likewise",
    "test_bounds_in_a_pipeline": "an atomic pipeline is in a slot",
    "test_increment_many_refuses_a_value_that_is_no_integer": "the other servers' part is done",
    "test_increment_many_refuses_an_overflow": "the other servers' part is done",
}
OWN_FIXTURES = {"make_store", "clock", "variant"}


def leave_out(into: dict[str, Any], fixtures: set[str] = OF_ONE_SERVER) -> None:
    """Take out of a module what was adopted and is of one server."""
    for name, test in [*into.items()]:
        if (
            name.startswith("test_")
            and inspect.isfunction(test)
            and (
                f"test_{name.partition('__')[2]}" in NOT_SHARDED
                or not fixtures.isdisjoint(inspect.signature(test).parameters)
            )
        ):
            del into[name]


again.adopt(globals(), MODULES, own=OWN_FIXTURES, left_out={}, one_in=16)
leave_out(globals())

LAYOUTS = [(1, 1), *([(1, 32)] if FULL else []), (3, 32)]


@pytest.fixture(scope="session", params=LAYOUTS, ids=lambda each: f"{each[0]}x{each[1]}")
def layout(request: pytest.FixtureRequest, server: Server | UserServer) -> Iterator[list[str]]:
    """The DSNs of servers with slots and all tables."""
    if isinstance(server, UserServer):
        pytest.skip("makes databases: not on the server of PGKV_TEST_DSN")
    count, slots = request.param
    more = [Server(server.binaries) for _ in range(count - 1)]
    name = f"n_{secrets.token_hex(4)}"
    dsns = [sharded.databases(each.dsn, [name])[0] for each in (server, *more)]
    sharded.init(dsns, slots)
    yield dsns
    for each in more:
        each.remove()


class Clocks:
    """The clocks of all servers, moved together."""

    def __init__(self, dsns: list[str]) -> None:
        self.each = [ServerClock(dsn) for dsn in dsns]

    def __getattr__(self, name: str) -> Any:
        def of_all(*args: Any) -> Any:
            answer = None
            for clock in self.each:
                answer = getattr(clock, name)(*args)
            return answer

        return of_all


@pytest.fixture
def clock(layout: list[str]) -> Iterator[Clocks]:
    clocks = Clocks(layout)
    yield clocks
    clocks.close()


@pytest.fixture
def make_store(
    request: pytest.FixtureRequest,
    layout: list[str],
    variant: Variant,
    dsn: str,
    event_loop_runner: asyncio.Runner,
) -> Iterator[Callable[..., Coroutine[Any, Any, Any]]]:
    # Its fixture looks for connections that are left open: after the stores were closed, and the
    # loop, whose last tasks may have some in use.
    del dsn
    dsns = layout
    if "clock" in request.fixturenames:
        dsns = [clock.dsn for clock in request.getfixturevalue("clock").each]
    with closing_all(event_loop_runner) as made:

        async def make(**config: Any) -> Any:
            if (dsn := config.pop("dsn", None)) is not None:
                options = conninfo_to_dict(dsn).get("options")
                config["dsns"] = [make_conninfo(each, options=options) for each in dsns]
            made.append(await sharded.connect(variant, config.pop("dsns", dsns), **config))
            return made[-1]

        yield make
    sharded.clear(layout)
