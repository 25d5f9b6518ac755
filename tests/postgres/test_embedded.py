"""The embedded server: one for all its users, gone with the last, whatever happens to them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.pq import Ping

from pgkv import Store, embedded
from pgkv._embedded import binaries as _binaries
from pgkv._embedded import cluster as _cluster
from pgkv._embedded.binaries import Binaries
from pgkv._embedded.cluster import Cluster
from pgkv.errors import ConfigError, StoreUnavailableError
from tests import FULL, servers
from tests.servers import THROWAWAY, wait_until

pytestmark = pytest.mark.skipif(not servers.installed(), reason="no PostgreSQL server binaries")

# A process that uses an embedded server and does as it is told.
USER = """
import os, sys
from pgkv import embedded
from pgkv._embedded import binaries as _binaries
path, binaries = sys.argv[1:3]
_binaries.binary_directories = lambda: [binaries]
for order in sys.stdin:
    if order == "start\\n":
        server = embedded.start(path, settings={"fsync": "off"})
        print(server.dsn, flush=True)
    elif order == "close\\n":
        server.close()
        print("closed", flush=True)
    elif order == "fork\\n":
        child = os.fork()
        if child == 0:
            os.read(int(sys.argv[3]), 1)  # until the test's end of the pipe is closed
            os._exit(0)
        print(child, flush=True)
"""


class User:
    """Another process."""

    def __init__(self, path: Path, binaries: Binaries) -> None:
        # Its other end closes with this process, or with kill(): what the other forked ends then.
        self._hold, self._release = os.pipe()
        self.left = False
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(path), binaries.directory, str(self._hold)],
            pass_fds=[self._hold],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def send(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, order: str) -> str:
        self.send(order)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def leave(self) -> None:
        """The ordinary end of a process, exit handlers included; and of what it forked."""
        self.left = True
        os.close(self._hold)
        os.close(self._release)
        self.process.communicate()


@pytest.fixture(
    params=list(servers.installed().values())[: None if FULL else 2], ids=lambda b: f"pg{b.major}"
)
def binaries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Binaries:
    """The wheel's, the system's: all tests with each, of the system's one cell. All with PGKV_TESTS=full, and
    a third one."""
    found: Binaries = request.param
    monkeypatch.setattr(_binaries, "binary_directories", lambda: [found.directory])
    return found


@pytest.fixture
def empty() -> Iterator[Path]:
    """An empty directory; a server left in it is ended afterwards."""
    path = servers.new_directory("embedded")
    yield path
    for pid_file in path.parent.glob(f"{path.name}/**/postmaster.pid"):
        with contextlib.suppress(ConfigError):
            Cluster.open(pid_file.parents[1]).stop("immediate")
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def home(empty: Path, binaries: Binaries) -> Path:
    """A directory that has been used before: with data, without a server."""
    subprocess.run(["cp", "-a", servers._template(binaries) / "pgdata", empty], check=True)
    return empty


@pytest.fixture
def user(home: Path, binaries: Binaries) -> Iterator[Callable[[], User]]:
    """user() is one more process that may use the server of `home`."""
    made: list[User] = []

    def make() -> User:
        made.append(User(home, binaries))
        return made[-1]

    yield make
    for each in made:
        if not each.left:
            each.kill()
            each.leave()


def start(path: Path | str, **settings: str) -> embedded.EmbeddedServer:
    return embedded.start(path, settings={**THROWAWAY, **settings})


def ask(dsn: str, query: Any) -> Any:
    """One value of one row."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        row = conn.execute(query).fetchone()
        return row[0] if row else None


def do(dsn: str, statement: Any) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(statement)


def postmaster(path: Path) -> int | None:
    server = Cluster(path, servers.server_account()).postmaster()
    return server.pid if server else None


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "limit", "megabytes"),
    [
        (1 << 20, "max", 1024),  # 4 GB
        (1 << 20, str(2 << 30), 512),
        (1 << 25, "max", 4096),
        (1 << 14, "", 128),
    ],
)
def test_shared_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int, limit: str, megabytes: int
) -> None:
    """A quarter of the memory, or of what a container may use, between 128 MB and 4 GB."""
    monkeypatch.setattr(_cluster, "_CGROUP", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert _cluster.shared_buffers() == megabytes


def test_first_start(empty: Path, binaries: Binaries) -> None:
    """A path that does not exist becomes a server: UTF-8, no TCP port, fsync on, a log."""
    with embedded.start(empty / "a" / "b", settings={"work_mem": "7MB"}) as server:
        assert ask(server.dsn, "SHOW server_encoding") == "UTF8"
        assert ask(server.dsn, "SHOW listen_addresses") == ""
        assert ask(server.dsn, "SHOW fsync") == "on"
        assert ask(server.dsn, "SHOW work_mem") == "7MB"
        assert ask(server.dsn, "SHOW autovacuum_naptime") == "5s"
        assert ask(server.dsn, "SHOW server_version_num").startswith(str(binaries.major))
        assert server.path == empty / "a" / "b"
        assert "ready to accept connections" in server.log_path.read_text()
        assert "closed" not in repr(server)
        modes = {oct(p.stat().st_mode & 0o777) for p in (server.path, server.path / "pgdata")}
        assert modes == {"0o700"}
    assert "closed" in repr(server)
    assert postmaster(server.path) is None


def test_rows_survive_a_stop(home: Path) -> None:
    """The last close() is a clean stop: rows of UNLOGGED tables are there at the next start."""
    with start(home) as server:
        do(server.dsn, "CREATE UNLOGGED TABLE t AS SELECT 42 AS a")
    with start(home) as server:
        assert ask(server.dsn, "SELECT a FROM t") == 42


def test_close_ends_open_connections(home: Path) -> None:
    """A connection that was forgotten keeps the server from nothing."""
    server = start(home)
    with psycopg.connect(server.dsn, autocommit=True) as conn:
        server.close()
        assert postmaster(home) is None
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT 1")


def test_last_handle_stops(home: Path) -> None:
    """Two handles of one process are two users; closing one twice is closing it once."""
    one, two = start(home), start(home)
    assert one.dsn == two.dsn
    one.close()
    one.close()
    assert ask(two.dsn, "SELECT 1") == 1
    two.close()
    assert postmaster(home) is None


def test_threads_share_one_server(home: Path) -> None:
    """Eight threads that start at once get one server, and it is gone when the last has closed."""
    barrier = threading.Barrier(8)
    pids: list[int | None] = []

    def work() -> None:
        barrier.wait()
        with start(home) as server:
            assert ask(server.dsn, "SELECT 1") == 1
            pids.append(postmaster(home))
            barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 8
    assert len(set(pids)) == 1
    assert postmaster(home) is None


def test_relative_paths_and_links_name_one_server(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory is one server by whatever name it is reached."""
    (home / "link").symlink_to(home)
    monkeypatch.chdir(home.parent)
    with start(home) as one, start(home.name) as two, start(home / "link") as three:
        assert one.dsn == two.dsn == three.dsn
        assert one.path == two.path == three.path


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "ünïcödé-数据",
        "quote'\"back\\slash",
        "$HOME `x` %s %25",
        "comma,colon:=",
        "long" * 40,
        os.fsdecode(b"not-utf8-\xff"),
    ],
    ids=["space", "unicode", "quotes", "shell", "comma", "long", "bytes"],
)
def test_odd_paths(empty: Path, binaries: Binaries, name: str) -> None:
    """Any path that the system allows works, and its DSN can be taken apart and put together."""
    if sys.platform == "darwin" and "\udcff" in name:
        pytest.skip("macOS has no file names that are not UTF-8")
    path = empty / name
    with start(path) as server:
        assert (
            ask(psycopg.conninfo.make_conninfo(server.dsn, application_name="x"), "SELECT 1") == 1
        )
        socket = Path(str(psycopg.conninfo.conninfo_to_dict(server.dsn)["host"]))
        assert socket.stat().st_mode & 0o777 == 0o700
        assert postmaster(path)
    assert not socket.exists() or socket == path / "pgdata"


def test_environment_is_kept_from_the_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libpq's variables and a broken locale in the environment change nothing."""
    for name, value in {"PGPORT": "1", "PGDATA": "/nowhere", "PGHOST": "x", "LC_ALL": "xx"}.items():
        monkeypatch.setenv(name, value)
    with start(home) as server:
        assert ask(server.dsn, "SELECT 1") == 1


def test_claim_of_a_removed_directory(home: Path) -> None:
    """close() after somebody removed the directory does not raise."""
    server = start(home)
    pid = postmaster(home)
    subprocess.run(["rm", "-r", home], check=True)
    server.close()
    assert pid is not None
    with contextlib.suppress(ProcessLookupError):  # by itself it notices within a minute
        os.kill(pid, signal.SIGQUIT)
    wait_until(lambda: not _binaries.exists(pid), "the server ends")


# --- several processes ----------------------------------------------------------------------------


def test_last_process_stops(home: Path, user: Callable[[], User]) -> None:
    """The server outlives the process that started it, and stops with the last that uses it."""
    one, two = user(), user()
    dsn = one.do("start")
    assert two.do("start") == dsn
    pid = postmaster(home)
    one.leave()
    assert postmaster(home) == pid
    assert ask(dsn, "SELECT 1") == 1
    two.leave()
    assert postmaster(home) is None


LEFT_OPEN = """
import sys, pgkv
from pgkv._embedded import binaries
binaries.binary_directories = lambda: [sys.argv[2]]
store = pgkv.Store.embedded(sys.argv[1], notify=True)
events = store.watch("k").__enter__()
lease = pgkv.Lock(store, "l").acquire()
store.set("k", "v")
print(events.next(timeout=60).key)
"""


def test_a_program_that_closes_nothing_ends_without_a_word(home: Path, binaries: Binaries) -> None:
    """At exit the background's connections end before the server that they are to. psycopg_pool's
    threads are not waited for: it would say so, after 5 s for each."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, str(home), binaries.directory],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "k\n", "")
    assert postmaster(home) is None


def test_close_before_exit(home: Path, user: Callable[[], User]) -> None:
    """close() gives up the claim while the process lives on, and it may start again."""
    one = user()
    one.do("start")
    assert one.do("close") == "closed"
    assert postmaster(home) is None
    dsn = one.do("start")
    with start(home):
        one.do("close")
        assert ask(dsn, "SELECT 1") == 1
    assert postmaster(home) is None


def test_killed_user_does_not_count(home: Path, user: Callable[[], User]) -> None:
    """After kill -9 of one user the other is the last, and stops the server."""
    one = user()
    one.do("start")
    with start(home) as server:
        one.kill()
        assert ask(server.dsn, "SELECT 1") == 1
    assert postmaster(home) is None


def test_killed_user_with_a_living_child(home: Path, user: Callable[[], User]) -> None:
    """A child that a killed user forked, and that never used the server, does not count for it."""
    one = user()
    one.do("start")
    child = int(one.do("fork"))
    with start(home):
        one.kill()
        assert _binaries.exists(child)
    assert postmaster(home) is None
    assert _binaries.exists(child)


def test_killed_last_user(home: Path, user: Callable[[], User]) -> None:
    """A server whose only user was killed runs on; the next user joins it and then stops it."""
    one = user()
    dsn = one.do("start")
    pid = postmaster(home)
    one.kill()
    with start(home) as server:
        assert server.dsn == dsn
        assert postmaster(home) == pid
    assert postmaster(home) is None


def test_processes_that_start_at_once(empty: Path, binaries: Binaries) -> None:
    """Processes that start at once on an empty directory get one server."""
    users = [User(empty / "new", binaries) for _ in range(4)]
    try:
        for each in users:
            each.send("start")
        dsns = {each.answer() for each in users}
        assert len(dsns) == 1
        assert ask(dsns.pop(), "SELECT count(*) FROM pg_database") == 3
    finally:
        for each in users:
            each.leave()
    assert postmaster(empty / "new") is None
    log = (empty / "new" / "pgkv.log").read_text()
    assert log.count("starting PostgreSQL") == 1, log
    assert log.count("database system is shut down") == 1, log


def test_starts_and_stops_race(home: Path, user: Callable[[], User]) -> None:
    """A user that comes while the last one leaves has a server: the old one or a new one."""
    one, two = user(), user()
    one.do("start")
    for leaving, coming in [(one, two), (two, one)] * 5:
        leaving.send("close")
        dsn = coming.do("start")
        assert leaving.answer() == "closed"
        assert ask(dsn, "SELECT 1") == 1
    one.leave()
    two.leave()
    assert postmaster(home) is None


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork(home: Path) -> None:
    """A forked child has no claim: its close() and exit change nothing, its life does not count."""
    server = start(home)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            server.close()
            embedded._leave_all()  # what exit handlers would do
            os.close(write)
            os.read(read, 1)  # until the parent has gone on
        finally:
            os._exit(0)
    os.close(read)
    assert ask(server.dsn, "SELECT 1") == 1
    server.close()
    assert postmaster(home) is None
    os.close(write)
    os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_claims_for_itself(home: Path) -> None:
    """A forked child that calls start() is a user of its own, also after the parent has left."""
    server = start(home)
    (ready, tell_ready), (go, tell_go) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            own = start(home)
            os.write(tell_ready, b"x")
            os.close(tell_go)
            os.read(go, 1)
            own.close()
        finally:
            os._exit(0)
    os.read(ready, 1)
    server.close()
    assert ask(server.dsn, "SELECT 1") == 1
    os.close(tell_go)
    os.waitpid(child, 0)
    assert postmaster(home) is None
    for fd in (ready, tell_ready, go):
        os.close(fd)


# --- crashes --------------------------------------------------------------------------------------


def test_killed_server_starts_again(home: Path) -> None:
    """After kill -9 of the server start() recovers: logged rows stay, UNLOGGED tables are empty."""
    first = start(home)
    do(first.dsn, "CREATE TABLE logged AS SELECT 1 AS a")
    do(first.dsn, "CREATE UNLOGGED TABLE unlogged AS SELECT 1 AS a")
    pid = postmaster(home)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    # At once, and while this process still holds its claim: backends may not have noticed yet.
    second = start(home)
    assert second.dsn == first.dsn
    assert postmaster(home) != pid
    assert ask(second.dsn, "SELECT count(*) FROM logged") == 1
    assert ask(second.dsn, "SELECT count(*) FROM unlogged") == 0
    first.close()
    assert ask(second.dsn, "SELECT 1") == 1
    second.close()
    assert postmaster(home) is None


def test_start_waits_for_recovery_from_a_backend_crash(home: Path) -> None:
    """start() during the recovery from a killed backend returns a DSN that takes connections."""
    with start(home) as server, psycopg.connect(server.dsn) as conn:
        os.kill(conn.info.backend_pid, signal.SIGKILL)
        # Before the server knows, it takes connections, which its recovery then ends.
        wait_until(lambda: "was terminated by signal 9" in server.log_path.read_text(), "it knows")
        with start(home) as again:
            assert ask(again.dsn, "SELECT 1") == 1


def test_stale_pid_file_with_a_living_number(home: Path) -> None:
    """A postmaster.pid left by a crash, its number now another process's, hinders no start."""
    with start(home):
        text = (home / "pgdata" / "postmaster.pid").read_text()
    # A process of the server's own account: another's PostgreSQL itself takes for stale.
    account = servers.server_account()
    other = subprocess.Popen(["sleep", "600"], user=account.uid if account else None)
    try:
        stale = "\n".join([str(other.pid), *text.splitlines()[1:]]) + "\n"
        (home / "pgdata" / "postmaster.pid").write_text(stale)
        (home / "pgdata" / ".s.PGSQL.5432.lock").write_text(stale)
        assert postmaster(home) is None
        with start(home) as server:
            assert ask(server.dsn, "SELECT 1") == 1
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_start_waits_for_orphans(home: Path) -> None:
    """start() waits for a backend that outlived its killed server: both would write the data."""
    dsns: list[str] = []
    first = start(home)
    pid = postmaster(home)
    with psycopg.connect(first.dsn) as conn:
        backend = conn.info.backend_pid
        os.kill(backend, signal.SIGSTOP)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        starting = threading.Thread(target=lambda: dsns.append(start(home).dsn))
        starting.start()
        try:
            wait_until(
                lambda: "pre-existing shared memory" in first.log_path.read_text(), "refusal"
            )
            assert not dsns
        finally:
            os.kill(backend, signal.SIGCONT)
            starting.join()
    assert dsns == [first.dsn]
    assert ask(first.dsn, "SELECT 1") == 1
    embedded._leave_all()
    assert postmaster(home) is None


def test_killed_initdb(empty: Path, binaries: Binaries) -> None:
    """What an initdb left that was killed is thrown away, not started."""
    (empty / "pgdata.new").mkdir()
    (empty / "pgdata.new" / "PG_VERSION").write_text(str(binaries.major))
    with start(empty) as server:
        assert ask(server.dsn, "SELECT 1") == 1


def test_start_has_a_deadline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that takes too long raises StoreUnavailableError with the log; the next one works."""
    with monkeypatch.context() as patch:
        patch.setattr(_cluster, "START_TIMEOUT", -1.0)
        with pytest.raises(StoreUnavailableError, match=r"not ready after .*/pgkv\.log ends"):
            start(home)
    with start(home) as server:
        assert ask(server.dsn, "SELECT 1") == 1
    assert postmaster(home) is None


# --- what cannot work -----------------------------------------------------------------------------


def test_no_postgresql(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without binaries the error says which command installs them."""
    monkeypatch.setattr(_binaries, "binary_directories", list)
    with pytest.raises(ConfigError, match=r"pip install 'pgkv-toolkit\[embedded\]'"):
        start(empty)


def test_unusable_binaries(
    empty: Path, monkeypatch: pytest.MonkeyPatch, binaries: Binaries
) -> None:
    """Binaries that cannot be run are named with the reason, unless better ones are found."""
    broken = empty / "bin"
    broken.mkdir()
    for name in ("initdb", "postgres"):
        (broken / name).write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(_binaries, "binary_directories", lambda: [str(broken)])
    with pytest.raises(ConfigError, match=r"bin.*: Permission denied.*pip install"):
        start(empty / "data")
    both = [str(broken), binaries.directory]
    monkeypatch.setattr(_binaries, "binary_directories", lambda: both)
    with start(empty / "data") as server:
        assert ask(server.dsn, "SELECT 1") == 1


def test_old_binaries(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PostgreSQL that is too old is not taken, and the error says so."""
    monkeypatch.setattr(_binaries, "binary_directories", lambda: ["/old"])
    monkeypatch.setattr(_binaries, "version_of", lambda directory, account: 13)
    with pytest.raises(ConfigError, match=r"no PostgreSQL 14 or newer found \(too old: 13\)"):
        start(empty)


def test_search_finds_what_is_installed() -> None:
    """Each directory that the search names has initdb and postgres, none twice."""
    found = _binaries.binary_directories()
    assert found
    assert len(found) == len(set(found))
    assert all(Path(each, "postgres").exists() for each in found)


def test_data_of_another_version(home: Path, binaries: Binaries) -> None:
    """Data of a version that is not installed: the error names both, the data stays as it is."""
    (home / "pgdata" / "PG_VERSION").write_text("9\n")
    with pytest.raises(ConfigError, match=rf"data of PostgreSQL 9, but {binaries.major}"):
        start(home)
    assert (home / "pgdata" / "PG_VERSION").read_text() == "9\n"


@pytest.mark.skipif(len(servers.installed()) < 2, reason="one version of PostgreSQL only")
def test_data_chooses_its_binaries(
    home: Path, binaries: Binaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where several versions are installed, data is served by its own."""
    everything = [b.directory for b in servers.installed().values()]
    monkeypatch.setattr(_binaries, "binary_directories", lambda: everything)
    with start(home) as server:
        assert ask(server.dsn, "SHOW server_version_num").startswith(str(binaries.major))


def test_foreign_data_directory(home: Path) -> None:
    """A PostgreSQL data directory of somebody's is not taken over."""
    with pytest.raises(ConfigError, match="give its DSN"):
        start(home / "pgdata")


def test_server_that_refuses_to_start(home: Path) -> None:
    """A server that ends at once: the error has its words, and a later start is not hindered."""
    with pytest.raises(ConfigError, match=r"(?s)did not start.*shared_buffers"):
        start(home, shared_buffers="nonsense")
    with start(home) as server:
        assert ask(server.dsn, "SELECT 1") == 1


def test_path_that_cannot_be(empty: Path) -> None:
    """A path through a file is a ConfigError that names it."""
    (empty / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        start(empty / "file" / "data")


@pytest.mark.skipif(_binaries.is_root(), reason="root may write everywhere")
def test_unwritable_directory(empty: Path, binaries: Binaries) -> None:
    """A directory without the right to write is a ConfigError that names it."""
    empty.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        start(empty)
    empty.chmod(0o700)


@pytest.mark.skipif(not _binaries.is_root(), reason="about root")
def test_directory_closed_to_the_account(empty: Path, binaries: Binaries) -> None:
    """As root: a directory that the server's account cannot enter is named and left closed."""
    closed = empty / "closed"
    closed.mkdir(mode=0o700)
    (closed / "data").mkdir()
    with pytest.raises(ConfigError, match=r"cannot enter '.*/closed'"):
        start(closed / "data")
    assert closed.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(not _binaries.is_root(), reason="about root")
def test_root_takes_the_owner(empty: Path, binaries: Binaries) -> None:
    """As root: the server runs as the owner of its directory, who can use the files later."""
    os.chown(empty, 65534, 65534)
    with start(empty):
        server = Cluster.open(empty).postmaster()
        assert server is not None
        pid = server.pid
        assert Path(f"/proc/{pid}").stat().st_uid == 65534
    assert {p.stat().st_uid for p in empty.iterdir()} == {65534}


def test_squatted_socket_directory(home: Path) -> None:
    """The socket's directory in /tmp is used only if it is a closed directory of the server's account."""
    odd = home / "with space"
    odd.mkdir()
    subprocess.run(["mv", home / "pgdata", odd], check=True)
    if account := servers.server_account():
        os.chown(odd, account.uid, account.gid)
    short = Cluster(odd, servers.server_account())._short_socket_directory()
    short.mkdir(mode=0o755)
    try:
        with pytest.raises(ConfigError, match="another program made it"):
            start(odd)
    finally:
        short.rmdir()


# --- as root, in a directory of another account -----------------------------------------------------

as_root = pytest.mark.skipif(not _binaries.is_root(), reason="about root")


@pytest.fixture
def secret(empty: Path) -> Path:
    """A directory of root's, outside that of any server, with files that a server's has too."""
    path = servers.new_directory("secret")
    os.chown(path, 0, 0)
    names = ("postmaster.pid", "pgkv.lock", "pgkv.users", "pgkv.log", ".s.PGSQL.5432.lock")
    for name in names:
        (path / name).write_text("1\nsecret\n")
    (path / "PG_VERSION").write_text("18\n")
    return path


def is_untouched(secret: Path) -> bool:
    """Everything is still there, is root's, and says what it did."""
    files = sorted(secret.iterdir())
    texts = {each.read_text() for each in files if each.name != "PG_VERSION"}
    owners = {each.stat().st_uid for each in (secret, *files)}
    return len(files) == 6 and texts == {"1\nsecret\n"} and owners == {0}


def attempt(path: Path) -> None:
    """Start and stop a server there; that it is refused is as well."""
    with contextlib.suppress(ConfigError), start(path):
        pass


@as_root
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("name", ["pgkv.lock", "pgkv.users", "pgkv.log", "pgdata/postmaster.pid"])
def test_root_writes_through_no_link(
    home: Path, secret: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    """A link in the directory, to a file elsewhere: that file is not written and not given away."""
    link(secret / Path(name).name, home / name)
    attempt(home)
    assert is_untouched(secret)


@as_root
def test_root_does_not_quote_through_a_link(home: Path, secret: Path) -> None:
    """A log that is a link is not read for an error's text."""
    (home / "pgdata" / "PG_VERSION").write_text("nonsense")
    (home / "pgkv.log").symlink_to(secret / "pgkv.log")
    with pytest.raises((ConfigError, ValueError)) as caught:
        start(home)
    assert "secret\n" not in str(caught.value)


@as_root
def test_data_that_is_a_link(home: Path, secret: Path) -> None:
    """pgdata may not be a link: what it leads to is not used, and nothing there is removed."""
    (home / "pgdata").rename(home / "away")
    (home / "pgdata").symlink_to(secret)
    attempt(home)
    assert is_untouched(secret)


@as_root
@pytest.mark.parametrize("below", ["", "new/data"])
def test_a_way_through_another_accounts_link(empty: Path, secret: Path, below: str) -> None:
    """A path that leads through a link which another account made is refused."""
    bare = secret / "bare"
    bare.mkdir()
    (empty / "link").symlink_to(bare)
    os.chown(empty / "link", 65534, 65534, follow_symlinks=False)
    with pytest.raises(ConfigError, match="link"):
        start(empty / "link" / below)
    assert list(bare.iterdir()) == []
    assert bare.stat().st_uid == 0


@as_root
@pytest.mark.parametrize("name", ["pgdata.new", "sub"])
def test_a_directory_that_is_swapped_for_a_link(
    empty: Path, secret: Path, binaries: Binaries, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What was made as a directory and is a link a moment later is not given away."""
    mkdir = os.mkdir

    def swapped(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        mkdir(path, mode, dir_fd=dir_fd)
        if os.fspath(path).endswith(name):
            os.rename(path, f"{path}.away", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            os.symlink(secret, path, dir_fd=dir_fd)

    os.chown(empty, 65534, 65534)
    monkeypatch.setattr(os, "mkdir", swapped)
    attempt(empty / "sub")
    assert is_untouched(secret)


@as_root
@pytest.mark.skipif(sys.platform != "linux", reason="a process's directory is read from /proc")
def test_a_process_of_roots_is_no_server(home: Path) -> None:
    """A process that postmaster.pid names, and that stands in the directory, is not signalled unless it
    is the account's: it may be an administrator's shell."""
    shell = subprocess.Popen(["sleep", "600"], cwd=home / "pgdata")
    try:
        (home / "pgdata" / "postmaster.pid").write_text(
            f"{shell.pid}\n/\n0\n5432\n/tmp\n\n\nready\n"
        )
        assert postmaster(home) is None
        Cluster(home, servers.server_account()).stop("immediate")
        assert shell.poll() is None
    finally:
        shell.kill()
        shell.wait()


# --- libpq's environment ----------------------------------------------------------------------------

OTHERS = {
    "PGHOSTADDR": "192.0.2.1",
    "PGSSLMODE": "verify-full",
    "PGSSLROOTCERT": "/nowhere/root.crt",
    "PGSSLCERTMODE": "require",
    "PGREQUIREPEER": "stranger",
    "PGCHANNELBINDING": "require",
    "PGTARGETSESSIONATTRS": "standby",
    "PGGSSENCMODE": "disable",
    "PGUSER": "stranger",
    "PGDATABASE": "elsewhere",
    "PGPORT": "1",
}


@pytest.mark.parametrize("name", [*OTHERS, "PGSERVICE"])
def test_the_environment_is_kept_from_the_client(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The server is reached by its own parameters, whatever libpq's variables name for another one; so
    are a program's connections by its DSN."""
    if name == "PGSERVICE":
        words = {k.removeprefix("PG").lower(): v for k, v in OTHERS.items()}
        words |= {"channel_binding": words.pop("channelbinding"),
                  "target_session_attrs": words.pop("targetsessionattrs"),
                  "dbname": words.pop("database")}  # fmt: skip
        lines = ["[elsewhere]", *(f"{key}={value}" for key, value in words.items())]
        (tmp_path / "service.conf").write_text("\n".join(lines) + "\n")
        monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "service.conf"))
    monkeypatch.setenv(name, OTHERS.get(name, "elsewhere"))
    with start(home) as server:
        assert ask(server.dsn, "SELECT current_user || current_database()") == "postgrespostgres"
        with Store.connect(server.dsn) as store:
            store.set("k", "v")


def test_a_service_that_does_not_exist(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PGSERVICE without its definition does not keep the server from starting, nor from stopping."""
    monkeypatch.setenv("PGSERVICE", "no_such_service")
    with start(home):
        assert postmaster(home) is not None
    assert postmaster(home) is None


def test_a_failed_start_stops_what_it_started(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that runs and never answers is stopped when the start gives up."""
    monkeypatch.setattr(_cluster, "START_TIMEOUT", 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(_cluster, "ping", lambda _: Ping.NO_RESPONSE)
        with pytest.raises(StoreUnavailableError, match="not ready"):
            start(home)
    assert postmaster(home) is None


@pytest.mark.parametrize("path", ["", "a\0b", "a\nb"])
def test_impossible_path(path: str) -> None:
    """An empty path (which would be the current directory), a NUL or a newline is refused."""
    with pytest.raises(ConfigError, match="empty, or has a NUL or newline"):
        embedded.start(path)


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows gets an error that says what to do instead."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigError, match="on Windows give the DSN"):
        embedded.start("data")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dsn", "path"),
    [
        ("embedded:///var/lib/app", "/var/lib/app"),
        ("embedded:///a%20b/%C3%BC%3F", "/a b/ü?"),
        ("embedded:///a b/ü", "/a b/ü"),
        ("embedded:///x%ff", os.fsdecode(b"/x\xff")),
        ("embedded:///", None),
        ("embedded://", None),
    ],
)
def test_parse(dsn: str, path: str | None) -> None:
    """A DSN names an absolute path, percent-decoded, or none."""
    assert embedded.parse(dsn) == path


@pytest.mark.parametrize(
    "dsn",
    ["embedded:data", "embedded://data", "embedded:///x?a=secret", "postgresql://u:secret@h/"],
)
def test_parse_refuses(dsn: str) -> None:
    """Everything else is refused, without quoting what may be a password."""
    with pytest.raises(ConfigError) as caught:
        embedded.parse(dsn)
    assert "secret" not in str(caught.value)


def test_default_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is the user's own data directory; for root one that other accounts can reach."""
    monkeypatch.setattr(embedded, "is_root", lambda: False)
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert embedded.default_path() == Path("/data/pgkv/pg")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert embedded.default_path() == Path("/home/u/.local/share/pgkv/pg")
    monkeypatch.setattr(embedded, "is_root", lambda: True)
    assert embedded.default_path() == Path("/var/lib/pgkv/pg")
