"""`make soak MINUTES=10`: processes that use all patterns at once while everything around them breaks.

Workers are killed and paused, their connections terminated, the server restarted and its clock moved, at
random but by a seed that is printed. Afterwards the ledgers of the workers are held against the database:
totals are exact up to what was under way at a kill, and nothing else may differ. Memory, file
descriptors, connections and table sizes are shown at the start, in the middle and at the end.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psycopg

import pgkv
from pgkv.testing import ServerClock
from tests import servers
from tests.interleavings.soak_worker import ACCOUNTS, BURST, COUNTERS, ENTRIES, RATE, SLOTS
from tests.servers import Server

SCHEMA = "soak"
PROC = Path("/proc")  # no macOS has it
PROCESSES = 4
CLOCK_STEPS = (-2.0, -0.5, 0.5, 2.0)  # seconds
TOTALS = (
    *(f"count {name}" for name in COUNTERS),
    *("guarded soak", "effects soak", "orders soak", "shipped soak"),
)
QUIET_SECONDS = 6.0  # after the last fault: leases of the dead end, what was refused is repeated
# What may differ between the middle and the end beyond noise means growth.
MEMORY_GROWTH, MEMORY_NOISE = 1.15, 8.0  # MiB
TABLE_GROWTH, TABLE_NOISE = 1.5, 1.0  # MiB

TABLES = f"""
CREATE TABLE guarded (n bigint NOT NULL, fence bigint NOT NULL);
INSERT INTO guarded VALUES (0, 0);
CREATE TABLE slots (slot int PRIMARY KEY, token bigint NOT NULL);
INSERT INTO slots SELECT i, 0 FROM generate_series(0, {SLOTS}) i;
CREATE TABLE source (name text PRIMARY KEY, version bigint NOT NULL);
INSERT INTO source VALUES ('x', 1), ('y', 1), ('z', 1);
CREATE TABLE effects (key text);
CREATE TABLE orders (id text);
CREATE TABLE shipped (id text);
"""
# An order is shipped once, or its job is still there; and no key has two effects.
RECKONING = """
SELECT (SELECT n FROM guarded), (SELECT count(*) FROM effects), (SELECT count(DISTINCT key) FROM effects),
(SELECT count(*) FROM orders), (SELECT count(*) FROM shipped),
(SELECT count(*) FROM orders o WHERE 1 <> (SELECT count(*) FROM shipped s WHERE s.id = o.id)
+ (SELECT count(*) FROM kv_store_jobs j WHERE convert_from(j.payload, 'UTF8') = o.id))
"""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is in use at one moment; memory, files and threads are those of the two processes that are
    never killed, one of each kind, and 0 where there is no /proc."""

    memory: float
    files: int
    threads: int
    connections: int
    tables: float

    def row(self, when: str) -> str:
        return (
            f"{when:8}{self.memory:10.1f}{self.files:8}{self.threads:9}"
            f"{self.connections:13}{self.tables:13.1f}"
        )

    HEAD = (
        f"{'':8}{'memory/MiB':>10}{'files':>8}{'threads':>9}{'connections':>13}{'tables/MiB':>13}"
    )


@dataclasses.dataclass
class Report:
    """How a soak ended."""

    seed: int
    faults: collections.Counter[str]
    samples: dict[str, Sample]
    done: collections.Counter[str]
    problems: list[str]

    def text(self) -> str:
        lines = [
            f"seed {self.seed}",
            "faults: " + ", ".join(f"{n} {name}" for name, n in sorted(self.faults.items())),
            "done:   " + ", ".join(f"{n} {name}" for name, n in sorted(self.done.items())),
            Sample.HEAD,
            *(sample.row(when) for when, sample in self.samples.items()),
            *([] if PROC.exists() else ["no /proc here: memory, files and threads are left out"]),
            *(f"{n} x {what}" for what, n in collections.Counter(self.problems).items()),
            *([] if self.problems else ["all totals are exact, nothing grows"]),
        ]
        return "\n".join(lines)


class Soak:
    """One run over one server of its own.

    Args:
        server: is restarted; its clock is not its machine's.
        seed: of every random choice.
        pause: seconds, at most, that each actor rests between two calls.
    """

    def __init__(self, server: Server, seed: int, pause: float) -> None:
        self.server = server
        self.seed = seed
        self.rest = pause
        self.random = random.Random(seed)
        self.clock = ServerClock(server.dsn, schema=SCHEMA)
        self.folder = Path(tempfile.mkdtemp(prefix="pgkv-soak-"))
        self.workers: list[subprocess.Popen[bytes]] = []
        self.started = 0
        self.faults: collections.Counter[str] = collections.Counter()
        self.stepped_forward = 0.0
        self.offset = 0.0

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(self.clock.dsn, autocommit=True, application_name="soak")

    def run(self, seconds: float) -> Report:
        with self.connect() as conn:
            conn.execute(TABLES)
            conn.execute(pgkv.fence_sql(f"{SCHEMA}.guarded", "fence"))
        started = time.monotonic()
        self.workers = [self.start(number) for number in range(PROCESSES)]
        samples: dict[str, Sample] = {}
        try:
            # On a busy machine the imports alone take half a minute: what they take is no growth.
            self.wait(self.is_at_work, "the workers begin")
            began = time.monotonic()
            for when, share in (("start", 0.25), ("middle", 0.6), ("end", 1.0)):
                self.disturb(began + seconds * share)
                if self.has_lost_one():
                    break
                samples[when] = self.sample()
            else:
                time.sleep(QUIET_SECONDS)
                self.wait(self.is_enough, "each actor does something")
            problems = ["a worker ended by itself"] * self.has_lost_one()
        except TimeoutError as error:
            problems = [str(error)]  # the report says which actor did nothing
        finally:
            for worker in self.workers:
                worker.kill()
                worker.wait()
        elapsed = time.monotonic() - started
        if "end" in samples:
            problems += self.growth(samples)
        problems += self.reckon(elapsed)
        return Report(self.seed, self.faults, samples, self.done, problems)

    def start(self, number: int) -> subprocess.Popen[bytes]:
        self.started += 1
        kind = ("sync", "async")[number % 2]
        arguments = [self.clock.dsn, str(self.folder / f"{self.started}.log")]
        command = [sys.executable, "-m", "tests.interleavings.soak_worker", *arguments]
        with (self.folder / f"{self.started}.err").open("wb") as errors:
            return subprocess.Popen(
                [*command, str(self.random.randrange(1 << 30)), kind, str(self.rest)],
                stderr=errors,
            )

    def has_lost_one(self) -> bool:
        """Whether a worker has ended by itself."""
        return any(worker.poll() is not None for worker in self.workers)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until it is so, or a worker has ended by itself."""
        servers.wait_until(lambda: self.has_lost_one() or condition(), what, 240)

    def is_at_work(self) -> bool:
        """Whether each of the first workers has done something."""
        logs = [self.folder / f"{number}.log" for number in range(1, PROCESSES + 1)]
        return all(log.exists() and "\ndone" in log.read_text("utf-8") for log in logs)

    def is_enough(self) -> bool:
        """Whether each actor has done something, and the bounded table is filled."""
        _, done, _ = self.ledgers()
        time.sleep(0.5)  # they are long
        return all(done[name] for name in (*TOTALS, "admitted")) and self.entries() > ENTRIES / 2

    def entries(self) -> int:
        """How many the bounded table has."""
        with self.connect() as conn:
            row = conn.execute("SELECT count(*) FROM bounded").fetchone()
        assert row is not None
        return int(row[0])

    # -- faults

    def disturb(self, until: float) -> None:
        faults = {
            self.kill: 4, self.pause: 3, self.terminate: 6, self.step: 3, self.restart: 1,
        }  # fmt: skip
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, self.random.uniform(0.3, 1.5)))
            if time.monotonic() < until:
                (fault,) = self.random.choices(list(faults), list(faults.values()))
                fault()
                self.faults[fault.__name__] += 1

    def victim(self) -> int:
        return self.random.randrange(2, PROCESSES)  # the first two show what grows

    def kill(self) -> None:
        """kill -9 of a worker, and another in its place."""
        number = self.victim()
        self.workers[number].kill()
        self.workers[number].wait()
        self.workers[number] = self.start(number)

    def pause(self) -> None:
        """SIGSTOP, also beyond the end of leases' trust."""
        worker = self.workers[self.random.randrange(PROCESSES)]
        worker.send_signal(signal.SIGSTOP)
        time.sleep(self.random.choice((0.1, 0.5, 3.0, 6.0)))
        worker.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """End half of all connections."""
        with self.connect() as conn:
            conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND application_name <> 'soak' "
                "AND backend_type = 'client backend' AND random() < 0.5 AND datname IS NOT NULL"
            )

    def step(self) -> None:
        """Step the server's clock, by a few seconds in all."""
        seconds = self.random.choice([s for s in CLOCK_STEPS if abs(self.offset + s) <= 4])
        with self.connect() as conn:
            offset = round((self.offset + seconds) * 1e6)
            conn.execute(f"SELECT setval('{SCHEMA}.pgkv_clock_offset', {offset})")
        self.offset += seconds
        self.stepped_forward += max(0.0, seconds)

    def restart(self) -> None:
        """Stop the server, wait, start it again."""
        self.server.stop("fast")
        time.sleep(self.random.uniform(0, 0.5))
        self.server.start()

    # -- what is in use

    def sample(self) -> Sample:
        pids = [worker.pid for worker in self.workers[:2] if PROC.exists()]
        fields = [
            dict(line.split(":", 1) for line in (PROC / f"{pid}/status").read_text().splitlines())
            for pid in pids
        ]
        with self.connect() as conn:
            row = conn.execute(
                "SELECT (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgkv'), "
                "(SELECT sum(pg_total_relation_size(oid)) FROM pg_class "
                "WHERE relnamespace = %s::regnamespace AND relkind = 'r' "
                "AND relname NOT IN ('effects', 'orders', 'shipped'))",
                [SCHEMA],
            ).fetchone()
        assert row is not None
        return Sample(
            memory=sum(int(each["VmRSS"].split()[0]) for each in fields) / 1024,
            files=sum(1 for pid in pids for _ in (PROC / f"{pid}/fd").iterdir()),
            threads=sum(int(each["Threads"]) for each in fields),
            connections=row[0],
            tables=float(row[1]) / 2**20,
        )

    def growth(self, samples: dict[str, Sample]) -> list[str]:
        """What has grown between the middle and the end."""
        middle, end = samples["middle"], samples["end"]
        limits = {
            "memory": middle.memory * MEMORY_GROWTH + MEMORY_NOISE,
            "tables": middle.tables * TABLE_GROWTH + TABLE_NOISE,
            # Each actor may hold connections of its own at one moment and not at another.
            "files": middle.files + 16,
            "threads": middle.threads + 16,
            "connections": PROCESSES * 15,
        }
        return [
            f"{name} grew: {getattr(middle, name)} in the middle, {getattr(end, name)} at the end"
            for name, limit in limits.items()
            if getattr(end, name) > limit
        ]

    # -- what came of it

    def ledgers(self) -> tuple[collections.Counter[str], collections.Counter[str], list[str]]:
        """What was begun, what was done, and which promises were broken."""
        begun: collections.Counter[str] = collections.Counter()
        done: collections.Counter[str] = collections.Counter()
        problems: list[str] = []
        for path in self.folder.glob("*.log"):
            for line in path.read_text("utf-8").rpartition("\n")[0].splitlines():
                kind, *rest = line.split(" ")
                if kind == "begin":
                    begun[f"{rest[1]} {rest[2]}"] += 1
                elif kind == "done":
                    done[f"{rest[1]} {rest[2]}"] += 1
                elif kind == "admitted":
                    done["admitted"] += 1
                elif kind == "violation":
                    problems.append(" ".join(rest))
                elif kind in ("disturbed", "unknown"):
                    done[kind] += 1
        return begun, done, problems

    def reckon(self, elapsed: float) -> list[str]:
        """Hold the ledgers against the database."""
        begun, done, problems = self.ledgers()
        self.done = done
        errors = [path.read_text("utf-8", "replace") for path in self.folder.glob("*.err")]
        problems += [f"a worker failed:\n{text}" for text in errors if "Traceback" in text]
        totals: dict[str, int] = {}
        entries = self.entries()
        with pgkv.Store.connect(self.clock.dsn, table_type=pgkv.TableType.REGULAR) as store:
            for name in COUNTERS:
                totals[f"count {name}"] = int(store.get(f"count:{name}") or 0)
            accounts = store.get_many([f"account:{n}" for n in range(ACCOUNTS)])
            if sum(map(int, accounts.values())):
                problems.append(f"the accounts do not add up to 0: {accounts}")
        with self.connect() as conn:
            row = conn.execute(RECKONING).fetchone()
        assert row is not None
        totals["guarded soak"], totals["effects soak"], keys, *orders, wrong = row
        totals["orders soak"], totals["shipped soak"] = orders
        if totals["effects soak"] != keys:
            problems.append(f"{totals['effects soak']} effects of {keys} idempotency keys")
        if wrong:
            problems.append(f"{wrong} orders are lost or shipped twice")
        if not ENTRIES / 2 < entries < ENTRIES * 2:
            problems.append(f"{entries} entries in a table bounded to {ENTRIES}")
        for name, total in totals.items():
            if not done[name] <= total <= begun[name]:
                problems.append(
                    f"{name}: {total}, but {done[name]} are known to have happened and "
                    f"{begun[name]} were begun"
                )
        bound = BURST + RATE * (elapsed + self.stepped_forward)
        if done["admitted"] > bound:
            problems.append(f"the limiter admitted {done['admitted']}, its bound is {bound:.0f}")
        return problems


def soak(seconds: float, seed: int, pause: float = 0.02) -> Report:
    """Run one soak on a server of the newest version found here."""
    print(f"seed {seed}, {seconds / 60:g} minutes ...", flush=True)
    servers_found = servers.installed()
    # Dead rows are to go within the run, as they go in hours elsewhere.
    server = Server(servers_found[max(servers_found)], settings={"autovacuum_naptime": "1s"})
    soaking = Soak(server, seed, pause)
    try:
        return soaking.run(seconds)
    finally:
        soaking.clock.close()
        server.remove()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    arguments = parser.parse_args()
    try:
        report = soak(arguments.minutes * 60, arguments.seed)
    finally:
        servers.remove_base_directory()
    print(report.text())
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()
