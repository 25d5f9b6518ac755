"""One deadline for a whole call, and what libpq is told by the user's environment."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgkv import OperationTimeoutError, Store, StoreUnavailableError
from pgkv._engine.wire import poller
from tests.faults.proxy import Proxy
from tests.faults.support import newest, until
from tests.servers import LATE
from tests.variants import in_a_hurry

MakeStore = Callable[..., Awaitable[Any]]
pytestmark = newest


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """The port of a server that takes connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield listening.getsockname()[1]


async def test_the_second_host_is_reached_behind_a_silent_first(
    dsn: str, make_store: MakeStore
) -> None:
    """connect_timeout is each host's: a first host that is silent leaves the second its own."""
    with silent() as port, Proxy(dsn) as proxy:
        theirs = conninfo_to_dict(proxy.dsn)
        hosts = make_conninfo(
            dsn, host=f"127.0.0.1,{theirs['host']}", port=f"{port},{theirs['port']}"
        )
        for seconds in (2, 20):  # a loaded machine may need more for the second one
            try:
                store = await make_store(dsn=hosts, connect_timeout=seconds, operation_timeout=60)
            except (OperationTimeoutError, StoreUnavailableError):
                assert seconds == 2, "the second host had no time"
                continue
            await store.set("k", b"v")
            assert await store.get("k") == b"v"
            await store.close()
            break


async def test_every_host_has_its_turn_within_the_operation_timeout(
    dsn: str, make_store: MakeStore
) -> None:
    """With a connect_timeout as long as the whole call, each host gets its share of the call."""
    with silent() as port, Proxy(dsn) as proxy:
        theirs = conninfo_to_dict(proxy.dsn)
        hosts = make_conninfo(
            dsn, host=f"127.0.0.1,{theirs['host']}", port=f"{port},{theirs['port']}"
        )
        for seconds in (6, 40):  # half of it is the second one's
            timeouts = {"connect_timeout": seconds, "operation_timeout": seconds}
            try:
                store = await make_store(dsn=hosts, **timeouts)
            except (OperationTimeoutError, StoreUnavailableError):
                assert seconds == 6, "the first host had the whole time"
                continue
            assert await store.get("k") is None
            await store.close()
            break


async def test_preparing_and_answering_share_a_deadline(dsn: str, make_store: MakeStore) -> None:
    """Time that preparing took is not given to the answer again."""
    with Proxy(dsn) as proxy:
        store = await make_store(dsn=proxy.dsn, retry=None)
        await store.set("k", b"v")
        proxy.shape(delay=1.5)  # of each answer: to PREPARE and to the statement
        with in_a_hurry(store, 2.0), pytest.raises(OperationTimeoutError):
            await store.exists("k")
        await store.close()
        await until(lambda: not proxy.connections, "what was held has arrived")


def test_preparing_again_does_not_wait_for_longer(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that falls silent while an outdated statement is dropped has what is left of the call's time."""
    asked: list[float] = []

    def recording(fd: int) -> Callable[[float], Any]:
        poll = poller(fd)

        def wait(milliseconds: float) -> Any:
            asked.append(milliseconds)
            return poll(milliseconds)

        return wait

    monkeypatch.setattr("pgkv._engine.wire.poller", recording)
    with Proxy(dsn) as proxy, Store.connect(proxy.dsn, operation_timeout=4, retry=None) as store:

        def look() -> None:
            with store.pipeline() as pipe:
                pipe.get_entry("k")

        look()
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("ALTER TABLE kv_store ALTER COLUMN created_at TYPE timestamptz(3)")
        proxy.arm(b"DEALLOCATE", end="silence")
        asked.clear()
        with pytest.raises(OperationTimeoutError):
            look()
    waits = [each for each in asked if each > 0]
    assert len(waits) >= 2  # for the pipeline and for the DEALLOCATE
    assert waits == sorted(waits, reverse=True)


def test_environment_and_service_file_hold(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PGOPTIONS, PGAPPNAME and a service's settings are in force, as with psycopg alone; what pgkv
    needs is added."""
    params = {k: str(v) for k, v in conninfo_to_dict(dsn).items()}
    options, place = params.pop("options"), dict(params)
    place.pop("application_name", None)
    asked = "SELECT current_setting('search_path'), current_setting('jit'), current_setting('application_name')"

    def settings(dsn: str, **config: Any) -> tuple[str, ...]:
        with Store.connect(dsn, **config) as store:
            store.set("k", b"v")
            with psycopg.connect(store._channel.conninfo()) as conn:  # type: ignore[union-attr]  # PoolChannel's
                row = conn.execute(asked).fetchone()
                assert row is not None
                return row

    path = settings(make_conninfo("", **place, options=options))[0]
    assert path != '"$user", public'

    monkeypatch.setenv("PGOPTIONS", options)
    monkeypatch.setenv("PGAPPNAME", "from the environment")
    assert settings(make_conninfo("", **place)) == (path, "off", "from the environment")
    named = settings(make_conninfo("", **place), application_name="mine")
    assert named == (path, "off", "mine")

    monkeypatch.delenv("PGOPTIONS")
    monkeypatch.delenv("PGAPPNAME")
    service = tmp_path / "pg_service.conf"
    lines = [f"{name}={value}" for name, value in place.items()]
    service.write_text(
        "\n".join(["[shop]", *lines, f"options={options} -c jit=on", "application_name=served", ""])
    )
    monkeypatch.setenv("PGSERVICEFILE", str(service))
    assert settings("service=shop") == (path, "on", "served")


@pytest.mark.parametrize("wrong", [{"user": "nobody_of_this_name"}, {"dbname": "no_such_database"}])
async def test_what_stays_wrong_is_not_retried(
    dsn: str, make_store: MakeStore, wrong: dict[str, str]
) -> None:
    """A role or database that does not exist is refused once, not asked for again."""
    with (
        Proxy(dsn) as proxy,
        pytest.raises(StoreUnavailableError, match="does not exist") as caught,
    ):
        await make_store(dsn=make_conninfo(proxy.dsn, **wrong))
    assert not caught.value.retryable


@pytest.mark.parametrize("kept", [True, False], ids=["while sending", "while connecting"])
async def test_a_pipeline_ends_at_its_deadline(dsn: str, make_store: MakeStore, kept: bool) -> None:
    """However many parts it is sent in, over a link that takes no more of them, or is not there:
    all of it is one call, and so is each operation of it."""
    with Proxy(dsn) as proxy:
        # The connection of the first call may still be ending: of a pool of one, it would have the place.
        store = await make_store(dsn=proxy.dsn, pool_max_size=2, connect_timeout=60)
        await store.set("k", b"v")
        proxy.hold()
        if not kept:
            with in_a_hurry(store, 1.0), pytest.raises(OperationTimeoutError):
                await store.get("k")
        started = time.monotonic()
        with (
            in_a_hurry(store, 1.0),
            pytest.raises((OperationTimeoutError, StoreUnavailableError)),
        ):
            async with store.pipeline() as pipe:
                for i in range(36):
                    pipe.set(f"k{i}", b"x" * 1024 * 1024 if kept else b"x")
        # A second for the call, one for a request to cancel it that nothing takes, and a few for a
        # busy machine; each operation by itself would have taken a second.
        assert time.monotonic() - started < 6 + LATE
        proxy.release()
        await store.close()
