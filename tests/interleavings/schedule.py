"""A scheduler that holds all the strings: every order in which clients' steps can reach the server.

Clients are coroutines over real `Async...` objects, the server is real, and a step is one operation that
reaches it (or a call of `World.step`, for what a client does elsewhere). The event loop has a clock of its
own, and asks the scheduler what happens next whenever every client waits: which step is performed, or which
fault strikes. `explore` goes through all schedules depth first, up to a bound:

* a switch away from a client that could have gone on is a preemption, and a schedule has at most
  `preemptions` of them (Musuvathi and Qadeer, "Iterative context bounding", PLDI 2007);
* a schedule has at most `faults` faults;
* of two orders that differ only in steps which commute, one is run (sleep sets: Godefroid, 1996).

Each schedule has a number, the choices it made in base 36: ``python -m tests.interleavings NAME NUMBER``
runs one again and shows its steps. A failing one is shrunk first.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import logging
import math
import random
import selectors
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from typing import Any

import pgkv
from pgkv._engine._async.channel import AsyncPoolChannel
from pgkv._engine._sync.channel import PoolChannel
from pgkv._ops.drivers import drive
from pgkv._ops.op import Op
from pgkv._sql import Statements
from pgkv.errors import OperationTimeoutError
from pgkv.patterns.cache.call import context_of
from pgkv.patterns.lock import flows as lock_flows
from pgkv.testing import ServerClock

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
STEPS_MAX = 400  # of one schedule: a client that polls for ever is a fault of the scenario
ATTEMPTS = (
    5  # at a schedule that is not the same again: the server's clock goes on, whatever is slow
)
GO_ON = 0.7  # the share of a random schedule's points at which nothing special happens
EPOCH = 1_000_000.0  # where the clock of each schedule begins


class Abandoned(BaseException):
    """The schedule has ended; clients that are still there end too."""


class StuckError(AssertionError):
    """A client waits for something that never comes."""


@dataclasses.dataclass(eq=False)
class Step:
    """What a client wants to do next."""

    client: str
    name: str
    key: bytes
    writes: bool
    perform: Callable[[], Any]
    settle: Callable[[Any, BaseException | None], None]
    orphan: bool = False  # its client was cancelled: it may still happen, and nobody hears of it

    @property
    def identity(self) -> tuple[str, str, bytes]:
        return (self.client, self.name, self.key)

    def commutes_with(self, other: Step) -> bool:
        """Whether the order of the two cannot matter."""
        if self.client == other.client:
            return False
        reads = not (self.writes or other.writes)
        return reads or bool(self.key and other.key and self.key != other.key)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of the things that can happen next."""

    kind: str  # perform, late, lose, cancel, die, drop, jump, server
    client: str
    label: str
    step: Step | None = dataclasses.field(compare=False, hash=False, default=None)
    preempts: bool = dataclasses.field(compare=False, hash=False, default=False)
    seconds: float = 0.0

    @property
    def is_fault(self) -> bool:
        return self.kind != "perform"

    def commutes_with(self, other: Choice) -> bool:
        if self.is_fault or other.is_fault or self.step is None or other.step is None:
            return False
        return self.step.commutes_with(other.step)


@dataclasses.dataclass
class Node:
    """A point at which something was chosen."""

    choices: list[Choice]
    sleeping: set[Choice]
    chosen: int
    done: set[Choice] = dataclasses.field(default_factory=set)

    def next(self) -> int | None:
        """The next choice that is worth a schedule."""
        for number, choice in enumerate(self.choices):
            if choice not in self.sleeping and choice not in self.done:
                return number
        return None


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is explored.

    Args:
        name: of the scenario.
        clients: each is called with the world and returns what it is to do.
        invariant: is called after each step; raises AssertionError where something is wrong.
        check: is called when all clients have ended, with what they returned or raised.
        prepare: is called before each schedule.
        preemptions, faults: the bounds.
        kinds: the faults that may strike: an answer that comes ``late``, so that other steps come
            between; ``lose`` an answer after the commit, ``cancel``, ``die``,
            ``jump``.
        jumps: seconds by which all clocks jump.
        server_jumps: seconds by which only the server's clock jumps; below 0: back.
        around: is entered for each schedule.
        small: the preemptions with which `make test` runs all schedules of it, and not some at random.
    """

    name: str
    clients: dict[str, Callable[[World], Coroutine[Any, Any, Any]]]
    check: Callable[[World, dict[str, Any]], None]
    invariant: Callable[[World], None] | None = None
    prepare: Callable[[World], None] | None = None
    preemptions: int = 3
    faults: int = 1
    kinds: tuple[str, ...] = ("lose", "cancel", "die")
    jumps: tuple[float, ...] = ()
    server_jumps: tuple[float, ...] = ()
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    small: int | None = None


class World:
    """One schedule: the clients, their clock, and what is chosen.

    Attributes:
        sync: a Store on the same table, for the scenario itself. Without one there is no server.
        memory: whatever the scenario wants to note.
        held: the leases that clients hold.
        ahead: seconds of the server's clock before the clients'.
        current: the world whose schedule runs.
    """

    current: World | None = None

    def __init__(
        self,
        scenario: Scenario,
        sync: pgkv.Store | None,
        clock: ServerClock | None,
        stack: list[Node],
        kind: str = "async",
        dice: random.Random | None = None,
    ) -> None:
        self._dice = dice
        self.kind = kind
        self.scenario = scenario
        self._sync = sync
        self._clock = clock
        self.memory: dict[str, Any] = {}
        self.held: dict[str, Any] = {}
        self.passed = 0.0
        self.ahead = 0.0
        self._began = time.monotonic()
        self._stack = stack
        self._depth = 0
        self._steps: list[Step] = []
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._threads: dict[str, ClientThread] = {}
        self._begun: list[ClientThread] = []  # and not resumed yet
        self._dead: set[str] = set()
        self._over = False
        self._last = ""
        self._preemptions = scenario.preemptions
        self._faults = scenario.faults
        self.history: list[str] = []
        self.failure: BaseException | None = None
        self.is_redundant = self.has_diverged = False
        self._stores: dict[str, Any] = {}

    # -- what clients do

    @property
    def now(self) -> float:
        """The clients' clock. It goes as fast as the server's, which is moved with it."""
        return EPOCH + self.passed + self.took

    @property
    def took(self) -> float:
        """The seconds that the schedule itself has taken until now."""
        return time.monotonic() - self._began

    @property
    def sync(self) -> pgkv.Store:
        assert self._sync is not None
        return self._sync

    @property
    def clock(self) -> ServerClock:
        assert self._clock is not None
        return self._clock

    @property
    def is_sync(self) -> bool:
        """Whether the clients are threads."""
        return self.kind == "sync"

    @property
    def store(self) -> Any:
        """The client's own store, as of a process of its own; each of its operations is a step."""
        client = self.client()
        if client not in self._stores:
            self._stores[client] = _store(self)
        return self._stores[client]

    def make(self, what: str, *args: Any, **options: Any) -> Any:
        """`make("Lock", "a", ttl=10)`: a Lock or an AsyncLock on the client's store, to be awaited."""
        if self.is_sync:
            return Inline(getattr(pgkv, what)(self.store, *args, **options))
        return getattr(pgkv, f"Async{what}")(self.store, *args, **options)

    def client(self) -> str:
        """The client that runs, or on behalf of which a task runs."""
        return _client.get()

    async def step(self, name: str, perform: Callable[[], Any] = lambda: None) -> Any:
        """Something that a client does elsewhere: a step that commutes with no other."""
        if self.is_sync:
            return self.submit_sync(name, b"", perform, writes=True)
        return await self.submit(name, b"", perform, writes=True)

    async def submit(
        self, name: str, key: bytes, perform: Callable[[], Any], *, writes: bool
    ) -> Any:
        """A task wants this to be done."""
        if self._over:
            raise Abandoned
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def settle(answer: Any, error: BaseException | None) -> None:
            if not future.done():
                future.set_exception(error) if error is not None else future.set_result(answer)

        step = Step(self.client(), name, key, writes, perform, settle)
        self._steps.append(step)
        try:
            return await future
        except asyncio.CancelledError:
            # What was sent may still reach the server, at any later moment or never.
            if step in self._steps:
                step.orphan = True
            raise

    def submit_sync(
        self, name: str, key: bytes, perform: Callable[[], Any], *, writes: bool
    ) -> Any:
        """A thread wants this to be done."""
        if self._over:
            raise Abandoned
        thread = self._threads[self.client()]
        step = Step(self.client(), name, key, writes, perform, thread.settle)
        self._steps.append(step)
        return thread.pause()

    def sleep(self, seconds: float) -> None:
        """A thread sleeps."""
        if self._over:
            raise Abandoned
        thread = self._threads[self.client()]
        thread.wakes_at = self.now + seconds
        thread.pause()

    def later(self, work: Callable[[], Any], done: Callable[[], object] | None) -> bool:
        """What a client's process does in its background is done by a client more: ``A'``."""
        name = self.client() + "'"
        while name in self._tasks or name in self._threads:
            name += "'"

        async def client(_: World) -> None:
            try:
                answer = work()
                if not self.is_sync:
                    await answer
            finally:
                if done is not None:
                    done()

        if self.is_sync:
            self._threads[name] = thread = ClientThread(self, name, client)
            self._begun.append(thread)
        else:
            context = contextvars.copy_context()
            context.run(_client.set, name)
            loop = asyncio.get_running_loop()
            self._tasks[name] = loop.create_task(client(self), name=name, context=context)
        return True

    # -- the schedule

    def run(self) -> None:
        """Run the clients to their end, one schedule of it."""
        scenario = self.scenario
        if scenario.prepare is not None:
            scenario.prepare(self)
        random.seed(scenario.name)
        World.current = self
        try:
            with scenario.around(), _clock_of(self), _quiet():
                if self.is_sync:
                    self._run_threads()
                else:
                    self._run_tasks()
        finally:
            if self._clock is not None:
                self._clock.set_offset(0)

    # -- threads

    def _run_threads(self) -> None:
        self._threads = {
            name: ClientThread(self, name, client) for name, client in self.scenario.clients.items()
        }
        for thread in tuple(self._threads.values()):
            thread.resume()
        while self.failure is None and not self.is_redundant:
            while self._begun:
                self._begun.pop().resume()
            if self._depth >= STEPS_MAX:
                self._fail(StuckError(f"no end after {STEPS_MAX} steps"))
            elif choices := self._choices():
                choice = self._choose(choices)
                if choice is not None:
                    self._follow(choice)
            elif self._all_ended():
                break
            else:
                sleeping = [
                    t for n, t in self._threads.items() if t.wakes_at and not self._is_dead(n)
                ]
                first = min(sleeping, key=lambda t: t.wakes_at or 0.0)
                self.pass_time(max(0.0, (first.wakes_at or 0.0) - self.now))
                first.resume()
        if self.failure is None and not self.is_redundant:
            self._judge()
        self._over = True
        for thread in self._threads.values():
            thread.abandon()
        for store in self._stores.values():
            store.close()

    # -- tasks

    def _run_tasks(self) -> None:
        loop = VirtualLoop(self)
        loop.set_exception_handler(lambda *_: None)  # of clients that died, nobody asks
        try:
            loop.run_until_complete(self._main())
        finally:
            with contextlib.suppress(Exception):
                loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        for name, client in self.scenario.clients.items():
            _client.set(name)
            self._tasks[name] = loop.create_task(client(self), name=name)
        _client.set("")
        try:
            await self._ended.wait()
            if self.failure is None and not self.is_redundant:
                self._judge()
        finally:
            await self._end()

    def _judge(self) -> None:
        """Every client has ended: is everything as it should be?"""
        try:
            self.scenario.check(self, {name: self._result(name) for name in self.scenario.clients})
        except Exception as error:  # a failure of the schedule is its result
            self.failure = error

    def _result(self, name: str) -> Any:
        if name in self._dead:
            return Died
        if self.is_sync:
            return self._threads[name].result
        task = self._tasks[name]
        if task.cancelled():
            return Cancelled
        return task.exception() or task.result()

    def _all_ended(self) -> bool:
        names = (*self._tasks, *self._threads)
        return all(self._is_dead(name) or self._has_ended(name) for name in names)

    def _is_dead(self, name: str) -> bool:
        return name.rstrip("'") in self._dead

    def _has_ended(self, name: str) -> bool:
        return self._threads[name].has_ended if self.is_sync else self._tasks[name].done()

    async def _end(self) -> None:
        """End whatever is still there."""
        self._over = True
        for store in self._stores.values():
            await store.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for _ in range(20):
            for step in self._steps:
                step.settle(None, Abandoned())
            self._steps.clear()
            for task in others:
                task.cancel()
            await asyncio.sleep(0)
            if all(task.done() for task in others):
                break
        for task in others:
            if task.done() and not task.cancelled():
                task.exception()

    def idle(self, timeout: float | None) -> None:
        """Every task waits: something has to happen."""
        if self._over or self._ended.is_set():
            self.passed += 1.0 if timeout is None else timeout
            return
        if self._depth >= STEPS_MAX:
            self._fail(StuckError(f"no end after {STEPS_MAX} steps"))
            return
        choices = self._choices()
        if choices:
            choice = self._choose(choices)
            if choice is not None:
                self._follow(choice)
        elif self._all_ended():
            self._ended.set()
        elif timeout is None:
            self._fail(StuckError("every client waits, for nothing"))
        else:
            self.pass_time(timeout + 1e-6)

    def _fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        self._stop()

    def _stop(self) -> None:
        if not self.is_sync:
            self._ended.set()

    def pass_time(self, seconds: float) -> None:
        """Let every clock go on, the server's too."""
        self.passed += seconds
        if self._clock is not None:
            self._clock.set_offset(self.passed + self.ahead)

    def _choices(self) -> list[Choice]:
        """What can happen now: first, that the client which went last goes on."""
        live = [step for step in self._steps if not self._is_dead(step.client)]
        live.sort(key=lambda step: (step.client != self._last or step.orphan, step.client))
        if not live:
            return []
        could_go_on = live[0].client == self._last and not live[0].orphan
        found = [
            Choice("perform", s.client, s.name, s, could_go_on and s.client != self._last)
            for s in live
            if self._preemptions or not could_go_on or s.client == self._last
        ]
        found += [Choice("drop", s.client, s.name, s) for s in live if s.orphan]
        if self._faults:
            kinds = self.scenario.kinds
            for step in [each for each in live if not each.orphan][:1]:
                for kind in ("late", "lose", "cancel", "die"):
                    if kind not in kinds or (kind == "lose" and not step.writes):
                        continue
                    is_later = step.client not in self.scenario.clients
                    if kind == "cancel" and (is_later or self._has_ended(step.client)):
                        continue
                    found.append(Choice(kind, step.client, step.name, step))
            found += [Choice("jump", "", f"{s:+g} s", seconds=s) for s in self.scenario.jumps]
            found += [
                Choice("server", "", f"{s:+g} s", seconds=s) for s in self.scenario.server_jumps
            ]
        return found

    def _choose(self, choices: list[Choice]) -> Choice | None:
        depth = self._depth
        self._depth += 1
        if depth < len(self._stack):
            node = self._stack[depth]
            if node.chosen >= len(choices):
                self.has_diverged = True
                self._fail(StuckError("the schedule is not the same when it is run again"))
                return None
            node.choices = choices
            return choices[node.chosen]
        if self._dice is not None:
            # Mostly on, now and then elsewhere: so that switches and faults come early and late.
            goes_on = self._dice.random() < GO_ON
            number = 0 if goes_on else self._dice.randrange(len(choices))
            self._stack.append(Node(choices, set(), number))
            return choices[number]
        sleeping: set[Choice] = set()
        if depth:
            before = self._stack[depth - 1]
            taken = before.choices[before.chosen]
            sleeping = {c for c in before.sleeping | before.done if c.commutes_with(taken)}
        node = Node(choices, sleeping, 0)
        chosen = node.next()
        if chosen is None:
            self.is_redundant = True
            self._stop()
            return None
        node.chosen = chosen
        self._stack.append(node)
        return choices[chosen]

    def _follow(self, choice: Choice) -> None:
        self.history.append(f"{choice.client}:{choice.label}" + _shown(choice))
        step = choice.step
        if choice.preempts:
            self._preemptions -= 1
        if choice.is_fault and choice.kind != "drop":
            self._faults -= 1
        if choice.kind in ("jump", "server"):
            self.ahead += choice.seconds if choice.kind == "server" else 0.0
            self.pass_time(choice.seconds if choice.kind == "jump" else 0.0)
            return
        assert step is not None
        if choice.kind == "cancel":
            step.orphan = True
            self._last = choice.client
            if self.is_sync:
                step.settle(None, KeyboardInterrupt())
            else:
                self._tasks[choice.client].cancel()
            return
        if choice.kind == "late":
            outcome = _outcome_of(step)
            step.perform, step.key, step.writes = lambda: _said(*outcome), b"", True
            step.name += ", answered"
            self._last = ""
            self._check_invariant()
            return
        self._steps.remove(step)
        if choice.kind == "drop":
            return
        if choice.kind == "die":
            self._dead.add(choice.client.rstrip("'"))
            self._steps = [each for each in self._steps if not self._is_dead(each.client)]
            return
        self._last = choice.client
        answer, error = _outcome_of(step)
        if choice.kind == "lose":
            error = OperationTimeoutError(f"{step.name}: the answer was lost")
        if not step.orphan:
            step.settle(answer, error)
        self._check_invariant()

    def _check_invariant(self) -> None:
        if self.scenario.invariant is not None:
            try:
                self.scenario.invariant(self)
            except AssertionError as broken:
                self._fail(broken)


def _outcome_of(step: Step) -> tuple[Any, BaseException | None]:
    """What a step's client is to hear."""
    try:
        return step.perform(), None
    except Exception as refused:  # the client's own answer
        return None, refused


def _said(answer: Any, error: BaseException | None) -> Any:
    if error is not None:
        raise error
    return answer


class Cancelled:
    """What a cancelled client returned."""


class Died:
    """What a client returned that died."""


def _shown(choice: Choice) -> str:
    return "" if choice.kind == "perform" else f" [{choice.kind}]"


# -- clients that are threads --------------------------------------------------------------


class ClientThread:
    """A client that blocks: it runs while the scheduler waits, and waits while that runs."""

    def __init__(self, world: World, name: str, client: Callable[[World], Any]) -> None:
        self.result: Any = None
        self.has_ended = False
        self.wakes_at: float | None = None
        self._answer: tuple[Any, BaseException | None] = (None, None)
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)

        def run() -> None:
            self._mine.acquire()
            _client.set(name)
            try:
                self.result = ended(client(world))
            except KeyboardInterrupt:
                self.result = Cancelled
            except BaseException as error:  # what it raised is its result
                self.result = error
            self.has_ended = True
            self._theirs.release()

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Let it go on until it waits again. The scheduler's."""
        self.wakes_at = None
        self._mine.release()
        self._theirs.acquire()

    def settle(self, answer: Any, error: BaseException | None) -> None:
        """Answer what it waits for. The scheduler's."""
        self._answer = (answer, error)
        self.resume()

    def pause(self) -> Any:
        """Wait until the scheduler answers. The thread's own."""
        self._theirs.release()
        self._mine.acquire()
        (answer, error), self._answer = self._answer, (None, None)
        if error is not None:
            raise error
        return answer

    def abandon(self) -> None:
        """End it, wherever it is."""
        for _ in range(STEPS_MAX):
            if self.has_ended:
                break
            self.settle(None, Abandoned())
        self._thread.join(1.0)


def ended(client: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that never waits: all that it awaits is done at once."""
    try:
        client.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a client of threads awaited something")


class Inline:
    """A blocking object of pgkv in awaited clothes: its calls happen in the thread that awaits them."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value) or name in ("check", "remaining"):
            return value
        return lambda *args, **options: Call(lambda: value(*args, **options))

    def __iter__(self) -> Iterator[Any]:
        return map(_wrapped, self._target)


class Call:
    """One call of an `Inline`: awaited, or entered."""

    def __init__(self, perform: Callable[[], Any]) -> None:
        self._perform = perform
        self._entered: Any = None

    def __await__(self) -> Generator[Any, None, Any]:
        yield from ()
        return _wrapped(self._perform())

    async def __aenter__(self) -> Any:
        self._entered = self._perform()
        return Inline(self._entered.__enter__())

    async def __aexit__(self, *error: object) -> Any:
        return self._entered.__exit__(*error)


def _wrapped(value: Any) -> Any:
    return Inline(value) if isinstance(value, pgkv.Lease | pgkv.Reservation | pgkv.Job) else value


# -- the event loop ------------------------------------------------------------------------

_client: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="")


class _Selector(selectors.SelectSelector):
    """Never waits: when nothing is ready, the world decides what happens."""

    world: World

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or timeout > 0:
            self.world.idle(timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock is the world's, but for the time that the schedule itself takes: no
    timer ends because the machine is slow."""

    def __init__(self, world: World) -> None:
        selector = _Selector()
        selector.world = world
        self._world = world
        super().__init__(selector)

    def time(self) -> float:
        return EPOCH + self._world.passed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What faults make pgkv log is no news here."""
    logger = logging.getLogger("pgkv")
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


@contextlib.contextmanager
def _clock_of(world: World) -> Iterator[None]:
    """Every clock that pgkv's modules read is the world's. No waiter leaves a note: it does so in its
    background, now and then, and nothing depends on it."""
    found: list[tuple[Any, str, Any]] = []
    for name, module in tuple(sys.modules.items()):
        if name.startswith("pgkv."):
            values = [(each, getattr(module, each, None)) for each in ("monotonic", "clock")]
            found += [
                (module, clock, value)
                for clock, value in values
                if callable(value) and not isinstance(value, type)
            ]
    its_notes, lock_flows.NOTE_AFTER = lock_flows.NOTE_AFTER, math.inf
    try:
        for module, clock, _ in found:
            setattr(module, clock, lambda: world.now)
        yield
    finally:
        lock_flows.NOTE_AFTER = its_notes
        for module, clock, value in found:
            setattr(module, clock, value)


# -- the store -----------------------------------------------------------------------------


# Upkeep that happens now and then, and is no part of a flow: it is done at once.
UPKEEP = frozenset(("lock_clean",))


class ScheduledChannel(AsyncPoolChannel):
    """Each operation is a step of the schedule, performed by a blocking store when its turn comes."""

    def __init__(self, world: World, config: pgkv.Config) -> None:
        super().__init__(config, NowhereAwaited())  # type: ignore[arg-type]  # nothing is sent by it
        self._world = world

    async def call(
        self, statement: Any, params: Any, timeout: float | None = None, op: Any = None
    ) -> Any:
        return await self.execute(op or Op(statement, params), timeout)

    async def execute(self, op: Op[Any], timeout: float | None = None) -> Any:
        world = self._world
        if op.statement.name in UPKEEP:
            return world.sync._execute(op)
        key = op.params[0] if op.params and op.statement.one_key else b""
        return await world.submit(
            op.statement.name,
            bytes(key or b""),
            lambda: world.sync._execute(op),
            writes=op.statement.writes,
        )

    async def _settle(self, step: Any, deadline: float, outcome: Any = None) -> Any:
        def flow() -> Any:
            return (yield step)

        world = self._world
        return await world.submit(step.name, b"", lambda: world.sync._run(flow()), writes=True)

    def watch(self, sql: Any) -> None:
        """Nothing is collected: that has tests of its own."""


class ScheduledThreadChannel(PoolChannel):
    """The same for threads."""

    def __init__(self, world: World, config: pgkv.Config) -> None:
        super().__init__(config, Nowhere())  # type: ignore[arg-type]  # nothing is sent by it
        self._world = world

    def call(
        self, statement: Any, params: Any, timeout: float | None = None, op: Any = None
    ) -> Any:
        return self.execute(op or Op(statement, params), timeout)

    def execute(self, op: Op[Any], timeout: float | None = None) -> Any:
        if op.statement.name in UPKEEP:
            return self._world.sync._execute(op)
        key = op.params[0] if op.params and op.statement.one_key else b""
        return self._world.submit_sync(
            op.statement.name,
            bytes(key or b""),
            lambda: self._world.sync._execute(op),
            writes=op.statement.writes,
        )

    def run(self, flow: Any, timeout: float | None = None) -> Any:
        return drive(flow, self.execute, timeout, self._together, self._world.sleep)

    def _settle(self, step: Any, deadline: float, outcome: Any = None) -> Any:
        def flow() -> Any:
            return (yield step)

        world = self._world
        return world.submit_sync(step.name, b"", lambda: world.sync._run(flow()), writes=True)

    def watch(self, sql: Any) -> None:
        """Nothing is collected: that has tests of its own."""


class Later:
    """In place of a pattern's runtime, where only its background is used: no lease is extended there,
    no notification arrives, and what is run later is a client more."""

    def __init__(self, world: World) -> None:
        self._world = weakref.ref(
            world
        )  # what is kept for a store would keep the world, and that the store

    def run_later(self, work: Callable[[], Any], done: Callable[[], object] | None) -> bool:
        world = self._world()
        return world is not None and world.later(work, done)

    def background(self) -> Later:
        return self

    def backgrounds(self) -> list[Later]:
        return [self]

    def placed(self, op: Op[Any]) -> tuple[Op[Any], Later]:
        return op, self

    renewer = listener = property(background)

    def add(self, *_: Any) -> None:
        """Nothing is renewed, nothing is heard."""

    discard = subscribe = add


class Nowhere:
    """In place of a pool."""

    loop = None
    idle: tuple[()] = ()

    def conninfo(self) -> str:
        return ""

    def is_exhausted(self) -> bool:
        return False

    def close(self) -> None:
        """There is nothing to close."""


class NowhereAwaited(Nowhere):
    """The same for tasks."""

    async def close(self) -> None:  # type: ignore[override]  # awaited
        """There is nothing to close."""


def _store(world: World) -> Any:
    config = world.sync._config
    kind: Any = pgkv.Store if world.is_sync else pgkv.AsyncStore
    channel = ScheduledThreadChannel if world.is_sync else ScheduledChannel
    store = kind.__new__(kind)
    store._bind(config, world.sync._target, Statements(config), channel(world, config))
    context: Any = context_of(store)
    context.runtime = Later(world)
    return store


# -- all schedules -------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What an exploration came to."""

    schedules: int
    steps: int
    is_complete: bool
    failure: Failure | None = None

    def __str__(self) -> str:
        return f"{self.schedules} schedules, {self.steps} steps" + (
            "" if self.is_complete else ", not all"
        )


@dataclasses.dataclass
class Failure:
    """A schedule that went wrong, as short as it could be made."""

    number: str
    history: list[str]
    error: BaseException

    def __str__(self) -> str:
        return (
            f"schedule {self.number}: {type(self.error).__name__}: {self.error}\n  "
            + "\n  ".join(self.history)
        )


def number_of(stack: Iterable[Node]) -> str:
    """A schedule's number: its choices in base 36."""
    return "".join(DIGITS[node.chosen] for node in stack).rstrip("0") or "0"


def explore(
    scenario: Scenario,
    sync: pgkv.Store | None = None,
    clock: ServerClock | None = None,
    *,
    kind: str = "async",
    at_most: int | None = None,
    until: float = math.inf,
) -> Outcome:
    """Run every schedule of a scenario within its bounds, or what is done until that monotonic time;
    or `at_most` random ones, the same each time."""
    stack: list[Node] = []
    schedules = steps = 0
    if at_most is not None:
        dice = random.Random(at_most)
        for schedules in range(1, at_most + 1):
            stack = []
            world = World(scenario, sync, clock, stack, kind, dice)
            world.run()
            steps += len(world.history)
            if world.failure is not None:
                return Outcome(schedules, steps, False, shrunk(stack, world))
        return Outcome(schedules, steps, False)
    while True:
        attempt = 0
        while True:
            world = World(scenario, sync, clock, stack, kind)
            world.run()
            attempt += 1
            if not world.has_diverged or attempt == ATTEMPTS:
                break
        if not world.is_redundant:
            schedules += 1
            steps += len(world.history)
        if world.failure is not None:
            return Outcome(schedules, steps, False, shrunk(stack, world))
        while stack:
            node = stack[-1]
            node.done.add(node.choices[node.chosen])
            following = node.next()
            if following is not None:
                node.chosen = following
                break
            stack.pop()
        if not stack:
            return Outcome(schedules, steps, True)
        if time.monotonic() >= until:
            return Outcome(schedules, steps, False)


def replay(
    scenario: Scenario,
    sync: pgkv.Store | None,
    clock: ServerClock | None,
    number: str,
    kind: str = "async",
) -> World:
    """Run one schedule by its number."""
    stack = [Node([], set(), DIGITS.index(digit)) for digit in number]
    world = World(scenario, sync, clock, stack, kind)
    world.run()
    return world


def shrunk(stack: list[Node], world: World) -> Failure:
    """The failing schedule with as few choices as still make it fail."""
    number = number_of(stack)
    assert world.failure is not None
    best = Failure(number, world.history, world.failure)
    for place in range(len(number)):
        for digit in DIGITS[: DIGITS.index(best.number[place])] if place < len(best.number) else "":
            attempt = best.number[:place] + digit + best.number[place + 1 :]
            again = replay(
                world.scenario, world._sync, world._clock, attempt.rstrip("0") or "0", world.kind
            )
            if again.failure is not None and type(again.failure) is type(best.error):
                best = Failure(attempt.rstrip("0") or "0", again.history, again.failure)
                break
    return best
