"""Writing many keys at once, by COPY, over a connection of its own: `Store.load`.

A chunk is one transaction. Its rows are copied into the table itself; once a key was there already,
into a temporary table, and written from there as `set_many` would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice, repeat
from operator import itemgetter
from struct import Struct
from threading import Event
from typing import Any, NamedTuple

import psycopg

from .._ops.codec import seconds
from .._sql import Statements
from .._sql.batch import LoadTexts
from ..errors import InvalidValueError, translate

CHUNK_ROWS = 20_000
CHUNK_BYTES = 32 * 1024 * 1024  # read ahead of what is sent, at most one value more
BATCH_ROWS = 1_000
EPOCH_2000 = 946_684_800_000_000  # microseconds after 1970, where a version counts from
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_MOMENT = Struct("!iq").pack
_NULL, _TRAILER = b"\xff" * 4, b"\xff\xff"
_FIRST, _SECOND = itemgetter(0), itemgetter(1)
CACHED_MAX = 10_000  # bytes: lengths below it are packed once


class Chunk(NamedTuple):
    """What one transaction writes: values by key, and microseconds to live of keys that have some."""

    values: dict[bytes, bytes]
    lives: dict[bytes, int | None]


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
                written += len(chunk.values)
                if progress is not None:
                    progress(written)
                chunk = next(chunks, None)
    except psycopg.Error as error:
        failure = translate(error, action="load", table=sql.t)
    else:
        return written
    raise failure from failure.__cause__


def _chunks(sql: Statements, items: Iterator[Any]) -> Iterator[Chunk]:
    """Values and lives of each chunk, by key. Of a repeated key the last item counts."""
    values: dict[bytes, bytes] = {}
    lives: dict[bytes, int | None] = {}
    size = 0
    while batch := list(islice(items, BATCH_ROWS)):
        ttls: Iterable[Any] = ()
        try:
            widths = set(map(len, batch))
            if widths == {2} and set(map(type, batch)) == {tuple}:
                names, contents = tuple(map(_FIRST, batch)), tuple(map(_SECOND, batch))
            elif widths <= {2, 3}:
                names, contents, ttls = zip(*((*item, None)[:3] for item in batch), strict=True)
            else:
                raise ValueError
        except (TypeError, ValueError):
            raise InvalidValueError("load: give (key, value) or (key, value, ttl)") from None
        keys, written = sql.columns(names, contents)
        ends = [None if ttl is None else round(seconds(ttl) * 1e6) or 1 for ttl in ttls]
        values.update(zip(keys, written, strict=True))
        if ends or lives:
            lives.update(zip(keys, ends or repeat(None), strict=bool(ends)))
        size += sum(map(len, written))
        if len(values) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield Chunk(values, lives)
            values, lives, size = {}, {}, 0
    if values:
        yield Chunk(values, lives)


def _insert(sql: Statements, conn: psycopg.Connection[Any], rows: Chunk) -> bool:
    """Copy rows into the table itself; False, and nothing done, if one of the keys is there."""
    with contextlib.suppress(psycopg.errors.UniqueViolation), conn.transaction():
        _copy(conn, sql.load_sql, sql.load_sql.insert, rows)
        return True
    return False


def _upsert(sql: Statements, conn: psycopg.Connection[Any], rows: Chunk) -> None:
    with conn.transaction():
        conn.execute(sql.load_sql.stage)
        _copy(conn, sql.load_sql, sql.load_sql.fill, rows)
        conn.execute(sql.load_sql.merge)


def _copy(conn: psycopg.Connection[Any], texts: LoadTexts, target: bytes, rows: Chunk) -> None:
    cursor = conn.cursor()
    cursor.execute(texts.now)
    now = int((cursor.fetchone() or (0,))[0])
    tail = 2 * _MOMENT(8, now) + _MOMENT(8, now + EPOCH_2000)
    keys = sorted(rows.values)  # as every batch: two of them do not deadlock
    heads, sizes, lives = _Packed("!hi", 6), _Packed("!i"), rows.lives
    with cursor.copy(target) as copy:
        copy.write(_HEADER)
        for first in range(0, len(keys), BATCH_ROWS):  # the server works meanwhile
            names = keys[first : first + BATCH_ROWS]
            values = list(map(rows.values.__getitem__, names))
            tails: Iterable[bytes] = repeat(_NULL + tail)
            if lives:
                ends = map(lives.get, names)
                tails = [(_NULL if n is None else _MOMENT(8, now + n)) + tail for n in ends]
            # Every step is a C function's: a line of Python for each row takes twice as long.
            parts = zip(
                map(heads.__getitem__, map(len, names)),
                names,
                map(sizes.__getitem__, map(len, values)),
                values,
                tails,
                strict=False,
            )
            copy.write(b"".join(chain.from_iterable(parts)))
        copy.write(_TRAILER)


class _Packed(dict[int, bytes]):
    """Numbers as they are sent, packed once each."""

    def __init__(self, form: str, *before: int) -> None:
        self._pack = partial(Struct(form).pack, *before)

    def __missing__(self, number: int) -> bytes:
        packed = self._pack(number)
        if number < CACHED_MAX:
            self[number] = packed
        return packed
