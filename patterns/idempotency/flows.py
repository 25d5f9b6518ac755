"""The algorithms of idempotency keys, each written once for sync and async: claim, complete, release.

An `AttemptState` is one call of `once()`: the answer to its claim, then its own result. In the caller's
transaction its uncommitted row is the lock. Elsewhere a `Claim` holds the key by a lease, which is
renewed in the background.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from random import uniform
from typing import Any, Generic, TypeVar

from ... import _observe
from ..._background.renewal import clock
from ..._engine.caller import check_inside, unwrap
from ..._engine.schema import companion, ensure
from ..._observe import shown
from ..._ops.codec import encode_key, encode_value, seconds
from ..._ops.op import Flow, call, do, pause
from ..._settings import refuse_pickle
from ...config import Config, Seconds, Table
from ...errors import (
    InProgressError,
    InvalidKeyError,
    InvalidValueError,
    KeyReusedError,
    LeaseLostError,
    PgkvError,
    TransactionError,
)
from .._runtime.checks import require_plain
from .._runtime.lease import Held
from .._runtime.runtimes import Runtime
from .._runtime.sql import sweep_slots
from .sql import BUSY, IDEMPOTENCY, SEPARATOR, Answer, IdempotencyStatements

T = TypeVar("T")

KEY_MAX = 512  # bytes of a key, and of a scope, in UTF-8
LEASE_MIN = 1.0  # seconds
# Seconds that a claim waits for a lock even with wait=0: the server has short locks of its own, such
# as for a table's next page, which have nothing to do with the key.
LOCK_WAIT_MIN = 0.02
LOCK_WAIT_MAX = 0.2  # seconds that one claim waits for a transaction that is about to take the key
REPEATS_INSIDE = 20  # of a claim in a transaction: each waited for another one's end
POLL_FIRST, POLL_GROWTH, POLL_MAX = 0.01, 1.5, 0.5  # seconds between claims; jittered down by half
CLEAN_UP = 1.0, 3.0  # seconds for a statement that ends a claim, and with its connection
RETRY_AFTER = 1.0  # seconds, where another transaction has the key: nothing tells when it ends


class Raw:
    """Results that are bytes, or text that comes back as bytes."""

    def encode(self, _key: str, value: Any) -> bytes:
        return encode_value(b"" if value is None else value, 1 << 30)

    def decode(self, _key: str, raw: bytes) -> bytes:
        return raw


class Claim(Held):
    """The lease of an attempt outside a transaction."""

    _noun = "the attempt of"
    _way_out = "; stop the work: another attempt may have begun"
    _lost_because = {  # noqa: RUF012  # read only
        "expired": "its lease ended before a renewal got through",
        "replaced": "another attempt took the key over, or it was forgotten",
        "broken": "it was released",
        "gone": "its row no longer exists",
        "forked": "it belongs to the parent process",
        "closed": "its store was closed",
        "released": "its block has ended",
    }

    def __init__(self, runtime: Any, attempt: AttemptState[Any], answer: Answer, at: float) -> None:
        self._name = attempt._name
        flows = attempt._flows
        super().__init__(runtime, flows.sql, attempt._key, answer.token, flows.lease, at)

    @property
    def name(self) -> str:
        return self._name

    def _signal(self, context: dict[str, Any]) -> None:
        _observe.warning("pgkv.idempotency.lost", key=self._name, **context)

    @classmethod
    def _renewal_failed(cls, count: int, context: dict[str, Any]) -> None:
        _observe.warning("pgkv.idempotency.renewal_failed", leases=count, **context)

    @classmethod
    def _abandoned(cls, name: str) -> None:
        _observe.warning("pgkv.idempotency.abandoned", key=name)


class IdempotencyFlows:
    """What all attempts of one `Idempotency` have in common."""

    def __init__(self, config: Config, prefix: bytes, ttl: Seconds, lease: Seconds) -> None:
        require_plain(config, "Idempotency", "results")
        self.ttl: float = seconds(ttl, endless="")
        self.lease: float = seconds(lease, "lease", endless="")
        if self.lease < LEASE_MIN or self.ttl < self.lease:
            raise InvalidValueError(
                f"lease must be {LEASE_MIN:g} second or more, and ttl no shorter than it, "
                f"not lease={self.lease:g} and ttl={self.ttl:g}"
            )
        self.timeout: float = config.operation_timeout
        self.size_max: int = config.max_value_size
        self.prefix = prefix
        self.shards: Any = getattr(config, "shards", None)
        self.table: Table = companion(config, IDEMPOTENCY)
        self.sql: IdempotencyStatements = IdempotencyStatements(config, self.table)
        self.ready: bool = not config.auto_create_table  # the table was looked for

    def key(self, key: str, scope: str) -> bytes:
        """Check a key and its scope, and return the row's key."""
        raw = encode_key(scope, b"", KEY_MAX, "scope") if scope != "" else b""
        raw += SEPARATOR + encode_key(key, b"", KEY_MAX, "idempotency key")
        if raw.count(SEPARATOR) > 1:
            raise InvalidKeyError("an idempotency key and its scope must not contain U+001F")
        raw = self.prefix + raw
        if self.shards is not None and self.shards.own is not None:
            self.shards.check(raw)
        return raw

    def create_table(self) -> Flow[None]:
        """Create the table where it is missing."""
        yield from ensure(self.table)
        self.ready = True

    def purge(self, limit: int) -> Flow[int]:
        """Delete rows whose time has passed."""
        return (yield from sweep_slots(self.sql, limit))


class AttemptState(Generic[T]):
    """What `Attempt` and `AsyncAttempt` share. Safe to use from any thread."""

    def __init__(
        self,
        flows: IdempotencyFlows,
        codec: Any,
        key: str,
        fingerprint: bytes | str,
        scope: str,
        wait: Seconds,
    ) -> None:
        self._flows = flows
        self._codec = codec
        self._name = key
        self._key = flows.key(key, scope)
        raw = fingerprint.encode() if isinstance(fingerprint, str) else bytes(fingerprint)
        self._fingerprint = hashlib.sha256(raw).digest() if raw else b""
        self._wait = seconds(wait, "wait", zero=True, endless="")
        self._answer = BUSY
        self._sent_at = 0.0
        self._lease: Claim | None = None
        self._pid = os.getpid()
        self._inside: Any = None  # the channel of the caller's transaction
        self._value: Any = None
        self._completed = False
        self._dropped = False  # release it at the block's end, though nothing was raised

    # -- what users read

    @property
    def is_replay(self) -> bool:
        """Whether the work was done before: `result` is what it left, and the block has nothing to do."""
        return self._answer.status == "done"

    @property
    def token(self) -> int:
        """A number that rises with every attempt of the key. Pass it to what the work changes
        elsewhere, and have that refuse lower ones."""
        return self._answer.token

    @property
    def result(self) -> T:
        """Of a replay: the first outcome. Otherwise what the block has set, which is stored at its
        end."""
        return self._value  # type: ignore[no-any-return]  # the codec's

    @result.setter
    def result(self, value: T | str) -> None:
        self._value = value

    @property
    def is_lost(self) -> bool:
        """Whether another attempt may have begun: the lease ended before it could be renewed. False in a
        transaction, which has no lease, and once it is completed. Costs no round trip."""
        if self._lease is None or self._completed:
            return os.getpid() != self._pid
        return self._lease.is_lost

    def check(self) -> None:
        """Return if no other attempt can have begun at this moment. Costs no round trip.

        Raises:
            LeaseLostError: one may have; `reason` says why.
        """
        if self.is_lost:
            raise self._lost()

    @shown
    def __repr__(self) -> str:
        return f"{self._name!r} token={self.token}, {self._answer.status}"

    __reduce__ = refuse_pickle

    # -- what pgkv does with it

    def _lost(self) -> LeaseLostError:
        if self._lease is not None:
            self._lease._lose("forked" if os.getpid() != self._pid else "replaced")
            return self._lease._lost_error()
        return LeaseLostError(f"the attempt of {self._name!r} is no longer held")

    def _encoded(self, value: Any) -> bytes:
        """Check that the attempt can be completed, and return its result's bytes."""
        if self.is_replay or self._completed:
            how = "is a replay" if self.is_replay else "was completed already"
            raise TransactionError(f"complete(): the attempt of {self._name!r} {how}")
        if os.getpid() != self._pid:
            raise self._lost()
        raw = b"" if value is None else self._codec.encode(self._name, value)
        if len(raw) > self._flows.size_max:
            raise InvalidValueError(
                f"the result is {len(raw):,} bytes long; max_value_size is {self._flows.size_max:,}"
            )
        self._value = value
        return raw

    def _claim(self, runtime: Runtime) -> Flow[None]:
        """Take the key, or learn what became of it; elsewhere than in a transaction."""
        flows = self._flows

        def claim(until: float) -> Flow[None]:
            wait = min(max(LOCK_WAIT_MIN, until - clock()), LOCK_WAIT_MAX)
            op = flows.sql.claim(self._key, self._fingerprint, flows.ttl, wait, flows.lease)
            # Not to be interrupted: a claim whose answer is lost holds the key to its lease's end.
            yield from call(runtime.finish, op, self._note)

        try:
            yield from self._await(claim)
        except GeneratorExit:
            raise
        except BaseException:
            if self._answer.status == "mine":
                yield from call(runtime.clean_up, self._release, *CLEAN_UP)
            raise
        if not self.is_replay:
            self._lease = runtime.watch(Claim(runtime, self, self._answer, self._sent_at))

    def _claim_inside(self, channel: Any) -> Flow[None]:
        """The same in the caller's transaction, within a savepoint."""
        self._inside = channel

        def claim(until: float) -> Flow[None]:
            key, sql = (self._key, self._fingerprint, self._flows.ttl), self._flows.sql
            self._note((yield from claim_inside(sql, *key, until)))

        yield from self._await(claim)

    def _note(self, answer: Answer) -> None:
        self._answer = answer

    def _await(self, claim: Callable[[float], Flow[None]]) -> Flow[None]:
        """Claim the key until it is not busy, or `wait` is over."""
        until, poll = clock() + self._wait, POLL_FIRST
        while True:
            self._sent_at = clock()
            try:
                yield from claim(until)
            except PgkvError as error:
                if error._sqlstate != "55P03":
                    raise
                self._answer = BUSY
                if self._inside is not None:
                    raise self._busy() from None  # the savepoint is rolled back
            left = until - clock()
            if self._answer.status != "busy" or left <= 0:
                return self._settle()
            poll = min(poll * POLL_GROWTH, POLL_MAX)
            yield from pause(min(left, uniform(poll / 2, poll)))  # noqa: S311  # no secret

    def _settle(self) -> None:
        """Raise what the answer says, or keep the result of the first attempt."""
        status = self._answer.status
        if status == "busy":
            raise self._busy()
        if status == "mismatch":
            raise KeyReusedError(
                f"the idempotency key {self._name!r} was used with another payload; "
                "use a new key for a new request"
            )
        raw = self._answer.result
        if status == "done" and (raw or isinstance(self._codec, Raw)):
            self._value = self._codec.decode(self._name, raw)

    def _busy(self) -> InProgressError:
        error = InProgressError(f"another attempt of {self._name!r} is under way; try again later")
        error.retry_after = self._answer.remaining or RETRY_AFTER
        return error

    def _complete(self, result: Any, conn: Any, wanted: type[Any], channel_of: type[Any]) -> Any:
        """`complete` by those classes of connection and channel; of asyncio a coroutine."""
        raw, channel = self._encoded(result), self._inside
        if conn is not None and channel is None:
            inner = unwrap(conn, wanted, "complete()")
            check_inside(inner, "complete()")
            channel = channel_of(inner, self._flows.timeout)
        inside = channel is not None
        return (channel or self._lease._runtime.channel).run(self._finish(raw, inside=inside))  # type: ignore[union-attr]  # a claim that is no replay has one

    def _ending(
        self, *, failed: bool
    ) -> tuple[Callable[[], Flow[None]], float | None, float] | None:
        """What a runtime's `clean_up` does when a block with a lease ends; None: nothing."""
        if failed or (self._dropped and not self._completed):
            if self.is_replay or os.getpid() != self._pid:
                return None
            return self._release, *CLEAN_UP
        if self.is_replay or self._completed:
            return None
        finish = partial(self._finish, self._encoded(self._value), inside=False)
        return finish, None, self._flows.timeout + CLEAN_UP[1]

    def _finish(self, raw: bytes, *, inside: bool) -> Flow[None]:
        """Record the outcome."""
        flows = self._flows
        op = flows.sql.complete(self._key, self.token, raw, flows.ttl, inside=inside)
        if not (yield from do(op)):
            raise self._lost()
        self._completed = True
        self._forget()

    def _release(self) -> Flow[None]:
        """Let the next attempt begin at once; nothing where the outcome is recorded."""
        yield from do(self._flows.sql.release(self._key, self.token))

    def _forget(self) -> None:
        """Renew it no more."""
        lease, pid = self._lease, self._pid
        if lease is not None and os.getpid() == pid:
            lease._runtime.forget(lease)
            lease._end()


def claim_inside(
    sql: IdempotencyStatements, key: bytes, fingerprint: bytes, ttl: float, until: float
) -> Flow[Answer]:
    """Take the key in a caller's transaction, or learn what became of it."""

    def wait() -> float:
        return max(LOCK_WAIT_MIN, until - clock())

    for _ in range(REPEATS_INSIDE):
        answer = yield from do(sql.insert(key, fingerprint, ttl, wait()))
        answer = answer or (yield from do(sql.look(key, fingerprint)))
        answer = answer or (yield from do(sql.take_over(key, fingerprint, ttl, wait())))
        if answer:
            return answer
    return BUSY
