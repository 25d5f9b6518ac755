"""A TCP proxy in front of a server's Unix socket, for faults that no server produces on demand.

`Proxy(dsn)` listens on loopback; its own `dsn` leads through it. What happens to the answers is said
by `answers`, for all connections, or once by `arm`. The proxy runs on an event loop in a thread of
its own, so that a test of either variant may block as it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from psycopg.conninfo import conninfo_to_dict, make_conninfo

T = TypeVar("T")

SSL_REQUEST = struct.pack("!II", 8, 80877103)
CANCEL_REQUEST = struct.pack("!I", 80877102)
# One protocol message: a letter and a length that counts itself.
HEADER = struct.Struct("!cI")
READY = b"Z"


@dataclass
class Fault:
    """What becomes of the answer to one question.

    Args:
        marker: bytes in the question (a key travels as it is).
        keep: how many bytes of the answer still arrive; the server has finished before they do.
        replace: what arrives instead of the answer.
        end: what follows: "reset", "eof" (the peer closes), "silence", or "nothing".
        before: do it instead of passing the question on.
        times: how many questions.
    """

    marker: bytes
    keep: int = 0
    replace: bytes | None = None
    end: str = "reset"
    before: bool = False
    times: int = 1
    met: int = 0


@dataclass(eq=False)
class _Wire:
    client: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    server: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    fault: Fault | None = None
    held: bytearray = field(default_factory=bytearray)
    silent: bool = False

    def abort(self) -> None:
        for _, writer in (self.client, self.server):
            reset(writer)


class Proxy:
    """Stands between a client and the server of `dsn` (a Unix socket, or TCP without TLS).

    Args:
        dsn: the server's.
        tls: speak TLS with the client, by a certificate made here. Needs the openssl program or
            the package cryptography: `certificate` makes it.
    """

    def __init__(self, dsn: str, *, tls: Path | None = None) -> None:
        self._upstream = conninfo_to_dict(dsn)
        self._tls: ssl.SSLContext | None = None
        if tls is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(tls)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._wires: set[_Wire] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._faults: list[Fault] = []
        self._gate: asyncio.Event = self._on_loop(_event())
        self._chunk = 0  # bytes of an answer that are written at once; 0: as they come
        self._pause = 0.0
        self._delay = 0.0
        self.accepted = 0
        self.cancels = 0
        self._listener: asyncio.Server | None = None
        self._port = 0
        self.listen()
        self.dsn = make_conninfo(
            dsn,
            host="127.0.0.1",
            port=self._port,
            sslmode="require" if tls else "disable",
            gssencmode="disable",
        )

    # -- control

    def arm(self, marker: bytes, **fault: Any) -> Fault:
        """Have a fault befall the next question in which `marker` appears."""
        armed = Fault(marker, **fault)
        self._faults.append(armed)
        return armed

    def hold(self) -> None:
        """A black hole: from now on nothing is passed on, in either direction."""
        self._on_loop(_done(self._gate.clear))

    def release(self) -> None:
        """End hold(): what was held arrives."""
        self._on_loop(_done(self._gate.set))

    def shape(self, *, chunk: int = 0, pause: float = 0.0, delay: float = 0.0) -> None:
        """Write answers so many bytes at a time, with a pause before each piece, after a delay."""
        self._chunk, self._pause, self._delay = chunk, pause, delay

    def reset_all(self) -> int:
        """Break every connection with a TCP reset; how many there were."""

        async def reset_wires() -> int:
            wires = tuple(self._wires)
            for wire in wires:
                wire.abort()
            # The loop closes the sockets in its next turn.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return len(wires)

        return self._on_loop(reset_wires())

    def half_close(self) -> int:
        """Say to every client that nothing more will come, as a server that ends does."""

        async def say() -> int:
            wires = tuple(self._wires)
            for wire in wires:
                wire.client[1].write_eof()
            return len(wires)

        return self._on_loop(say())

    def listen(self) -> None:
        """Take connections (again)."""

        async def begin() -> asyncio.Server:
            return await asyncio.start_server(self._accept, "127.0.0.1", self._port)

        self._listener = self._on_loop(begin())
        self._port = self._listener.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Take no more connections: "connection refused". Those that are open stay."""

        self._on_loop(self._close_listener())

    async def _close_listener(self) -> None:
        """asyncio drops a connection without closing it that it accepted in the turn of the close."""
        assert self._listener is not None
        for listening in self._listener.sockets:
            self._loop.remove_reader(listening.fileno())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self._listener.close()

    @property
    def connections(self) -> int:
        """How many are open now."""
        return len(self._wires)

    def close(self) -> None:
        """End the proxy and every connection through it."""

        async def end() -> None:
            await self._close_listener()
            # What was accepted a moment ago has no task yet, or one that has not begun: look until
            # there was nothing for a while.
            quiet = 0
            while quiet < 5:
                for task in tuple(self._tasks):
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                await asyncio.sleep(0.01)
                quiet = 0 if len(asyncio.all_tasks()) > 1 else quiet + 1

        self._on_loop(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- work

    def _on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._serve(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()  # what is not sent yet would keep the socket open
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        no_delay(writer)
        first = await reader.readexactly(8)
        if self._tls is not None and first == SSL_REQUEST:
            writer.write(b"S")
            await writer.start_tls(self._tls)
            first = await reader.readexactly(8)
        self.cancels += first[4:] == CANCEL_REQUEST
        host, port = str(self._upstream["host"]), self._upstream.get("port") or "5432"
        if host.startswith("/"):
            server = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            server = await asyncio.open_connection(host, int(port))
        wire = _Wire((reader, writer), server)
        self._wires.add(wire)
        pumps: list[asyncio.Future[None]] = []
        try:
            # PgBouncer 1.18 hangs up on a client whose first message comes in parts.
            first += await reader.readexactly(int.from_bytes(first[:4], "big") - len(first))
            pumps += map(asyncio.ensure_future, (self._questions(wire, first), self._answers(wire)))
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._wires.discard(wire)
            server[1].close()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _questions(self, wire: _Wire, data: bytes) -> None:
        reader, writer = wire.client[0], wire.server[1]
        while data:
            await self._gate.wait()
            fault = self._fault_for(data)
            if fault is not None and fault.before:
                if fault.replace is not None:
                    wire.client[1].write(fault.replace)
                await self._end(wire, fault)
                if fault.end != "nothing":
                    return
            else:
                wire.fault = fault or wire.fault
                writer.write(data)
                await writer.drain()
            data = await reader.read(1 << 16)

    def _fault_for(self, data: bytes) -> Fault | None:
        for fault in self._faults:
            if fault.met < fault.times and fault.marker in data:
                fault.met += 1
                return fault
        return None

    async def _answers(self, wire: _Wire) -> None:
        reader, writer = wire.server[0], wire.client[1]
        while data := await reader.read(1 << 16):
            await self._gate.wait()
            if wire.silent:
                continue
            if wire.fault is not None:
                wire.held += data
                # The server has committed what it reports ready after.
                if not whole(wire.held):
                    continue
                fault, data = wire.fault, bytes(wire.held)
                wire.fault = None
                wire.held.clear()
                data = data[: fault.keep] if fault.replace is None else fault.replace
                await self._write(writer, data)
                await self._end(wire, fault)
                continue
            await self._write(writer, data)
        if writer.can_write_eof():
            writer.write_eof()

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if self._delay:
            await asyncio.sleep(self._delay)
        step = self._chunk or len(data) or 1
        for start in range(0, len(data), step):
            if self._pause:
                await asyncio.sleep(self._pause)
            elif self._chunk:
                await asyncio.sleep(0)
            writer.write(data[start : start + step])
            await writer.drain()

    async def _end(self, wire: _Wire, fault: Fault) -> None:
        if fault.end == "silence":
            wire.silent = True
        elif fault.end == "eof":
            wire.client[1].write_eof()
        elif fault.end == "reset":
            wire.abort()


async def _done(step: Callable[[], object]) -> None:
    step()


async def _event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset where it is TCP: the peer's next use fails at once."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def no_delay(writer: asyncio.StreamWriter) -> None:
    """Every write becomes a packet."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def messages(data: bytes | bytearray) -> Iterator[tuple[bytes, bytes]]:
    """The whole protocol messages at the beginning of an answer."""
    at = 0
    while at + HEADER.size <= len(data):
        kind, length = HEADER.unpack_from(data, at)
        if at + 1 + length > len(data):
            return
        yield kind, bytes(data[at + HEADER.size : at + 1 + length])
        at += 1 + length


def whole(data: bytes | bytearray) -> bool:
    """Whether an answer has come to its end."""
    return any(kind == READY for kind, _ in messages(data))


def error_answer(sqlstate: str, text: str, *, severity: str = "ERROR") -> bytes:
    """What a server (or a pooler) that refuses a statement says, ready for the next."""
    fields = f"S{severity}\0V{severity}\0C{sqlstate}\0M{text}\0\0".encode()
    refusal = HEADER.pack(b"E", len(fields) + 4) + fields
    return refusal + HEADER.pack(READY, 5) + b"I"


def certificate(directory: Path) -> Path:
    """Make a self-signed certificate with its key in one file."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path = directory / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


__all__ = ["Fault", "Proxy", "certificate", "error_answer", "messages", "whole"]
