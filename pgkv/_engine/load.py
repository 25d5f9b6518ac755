"""Writing many keys at once, by COPY, over a connection of its own: `Store.load`.

A chunk is one transaction. Its rows are copied into the table itself; once a key was there already,
into a temporary table, and written from there as `set_many` would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from struct import Struct
from threading import Event
from typing import Any, TypeAlias

import psycopg

from .._ops.codec import seconds
from .._sql import Statements
from .._sql.batch import LoadTexts
from ..errors import InvalidValueError, translate

CHUNK_ROWS = 20_000
CHUNK_BYTES = 32 * 1024 * 1024  # read ahead of what is sent, at most one value more
BATCH_ROWS = 1_000
EPOCH_2000 = 946_684_800_000_000  # microseconds after 1970, where a version counts from
Row: TypeAlias = "tuple[bytes, int | None]"  # a value, and microseconds it has to live
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_FIELDS, _SIZE, _MOMENT = Struct("!hi").pack, Struct("!i").pack, Struct("!iq").pack
_NULL, _TRAILER = _SIZE(-1), b"\xff\xff"


def load(
    sql: Statements,
    conninfo: str,
    items: Iterable[Any],
    progress: Callable[[int], object] | None,
    stop: Event,
) -> int:
    """Write every item, chunk by chunk, until `stop` is set; how many keys."""
    if not hasattr(items, "__iter__"):
        raise InvalidValueError(f"load: items must be an iterable, not {type(items).__name__}")
    chunks = _chunks(sql, iter(items))
    chunk = next(chunks, None)  # the first items are looked at before anything is sent
    written, new = 0, True
    try:
        with psycopg.connect(conninfo, autocommit=True) as conn:
            while chunk is not None and not stop.is_set():
                new = new and _insert(sql, conn, chunk)
                if not new:
                    _upsert(sql, conn, chunk)
                written += len(chunk)
                if progress is not None:
                    progress(written)
                chunk = next(chunks, None)
    except psycopg.Error as error:
        failure = translate(error, action="load", table=sql.t)
    else:
        return written
    raise failure from failure.__cause__


def _chunks(sql: Statements, items: Iterator[Any]) -> Iterator[dict[bytes, Row]]:
    """The rows of each chunk, by key. Of a repeated key the last item counts."""
    rows: dict[bytes, Row] = {}
    size = 0
    while batch := list(islice(items, BATCH_ROWS)):
        try:
            names, contents, ttls = zip(*((*item, None)[:3] for item in batch), strict=True)
            if any(len(item) > 3 for item in batch):
                raise ValueError
        except (TypeError, ValueError):
            raise InvalidValueError("load: give (key, value) or (key, value, ttl)") from None
        values = sql.many_values(contents)
        lives = [None if ttl is None else round(seconds(ttl) * 1e6) or 1 for ttl in ttls]
        rows.update(zip(sql.many_keys(names), zip(values, lives, strict=True), strict=True))
        size += sum(map(len, values))
        if len(rows) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield rows
            rows, size = {}, 0
    if rows:
        yield rows


def _insert(sql: Statements, conn: psycopg.Connection[Any], rows: dict[bytes, Row]) -> bool:
    """Copy rows into the table itself; False, and nothing done, if one of the keys is there."""
    with contextlib.suppress(psycopg.errors.UniqueViolation), conn.transaction():
        _copy(conn, sql.load_sql, sql.load_sql.insert, rows)
        return True
    return False


def _upsert(sql: Statements, conn: psycopg.Connection[Any], rows: dict[bytes, Row]) -> None:
    with conn.transaction():
        conn.execute(sql.load_sql.stage)
        _copy(conn, sql.load_sql, sql.load_sql.fill, rows)
        conn.execute(sql.load_sql.merge)


def _copy(
    conn: psycopg.Connection[Any], texts: LoadTexts, target: bytes, rows: dict[bytes, Row]
) -> None:
    cursor = conn.cursor()
    cursor.execute(texts.now)
    now = int((cursor.fetchone() or (0,))[0])
    tail = 2 * _MOMENT(8, now) + _MOMENT(8, now + EPOCH_2000)
    parts = [_HEADER]
    with cursor.copy(target) as copy:
        for number, key in enumerate(sorted(rows)):  # as every batch: two of them do not deadlock
            value, life = rows[key]
            ends = _NULL if life is None else _MOMENT(8, now + life)
            parts += (_FIELDS(6, len(key)), key, _SIZE(len(value)), value, ends, tail)
            if number % BATCH_ROWS == 0:  # the server works meanwhile
                copy.write(b"".join(parts))
                parts = []
        parts.append(_TRAILER)
        copy.write(b"".join(parts))
