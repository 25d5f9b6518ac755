"""Statements of `store.watch`: the notification that names written keys, and the reads of what is watched.

A notification's payload is a JSON array: schema, table, then keys; without keys it stands for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from .._ops import codec as _codec
from .._ops.lazy import cached_property
from .._ops.op import BINARY, TEXT, Op, Result, Statement
from ..config import Config, TtlCleanupStrategy, quote_identifier
from ..types import ScanOptions
from .scan import LEFT, ScanStatements, read_texts
from .table import read_nothing

if TYPE_CHECKING:
    from ..transforms import Transforms

CHANNEL = "pgkv_watch"
KEYS_MAX = 7_000  # bytes of a payload's keys; the server takes less than 8,000 in all
PAYLOADS_MAX = 64  # of one batch; beyond that one payload without keys
PAGE = 1_000  # rows

NEVER_ENDS = float("inf")


class Seen(NamedTuple):
    """A row as it was read; `ends` is the monotonic time of its expiry."""

    version: int
    ends: float
    value: bytes | None


class WatchStatements(ScanStatements):
    """What a watched table is told and asked; keys carry their namespace's prefix.

    Args:
        config: the store's.
        values: read the values too.
        transforms: how they are stored.
    """

    def __init__(
        self, config: Config, *, values: bool = False, transforms: Transforms | None = None
    ) -> None:
        super().__init__(config)
        expires = config.ttl_cleanup_strategy is not TtlCleanupStrategy.DISABLED
        left = LEFT if expires else "NULL::float8"
        value = ", value" if values else ""
        self.selected: str = f"key, version, {left}{value}"
        self.values: bool = values
        self.transforms = transforms

    # -- telling

    @cached_property
    def _named(self) -> str:
        return (
            "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            f"WHERE c.oid = {self._regclass}"
        )

    @cached_property
    def _notify(self) -> Statement[None]:
        return self.reading(
            "watch_notify",
            f"SELECT pg_notify('{CHANNEL}', '[' || to_json(n.nspname::text) || ',' || "
            f"to_json(c.relname::text) || $1::text || ']') {self._named}",
            (TEXT,),
            read_nothing,
        )

    def notify(self, keys: Iterable[bytes]) -> list[Op[None]]:
        """Say that these keys may have changed; without any, that all may."""
        return [Op(self._notify, (each,)) for each in _payloads(keys)]

    # -- asking

    @cached_property
    def _name(self) -> Statement[list[str]]:
        return self.reading(
            "watch",
            f"SELECT n.nspname::text, c.relname::text {self._named}",
            (),
            read_texts(2),
        )

    def name(self) -> Op[list[str]]:
        """The table's schema and name, as notifications have them."""
        return Op(self._name)

    @cached_property
    def _read(self) -> Statement[dict[str, Seen]]:
        return self.reading(
            "watch",
            f"SELECT {self.selected} FROM {self.t} WHERE key = ANY($1::text[]) AND {self.readable}",
            (BINARY,),
            self._rows,
        )

    def read(self, keys: Iterable[str]) -> Op[dict[str, Seen]]:
        return Op(self._read, (_codec.encode_array([key.encode() for key in keys]),))

    def page(self, prefix: str, after: str | None) -> Op[dict[str, Seen]]:
        """The next keys with a prefix, `PAGE` at most, in order."""
        options = ScanOptions(prefix=prefix, after=after, limit=PAGE)
        return self._scan("watch", self.selected, self._rows, options)

    def _rows(self, result: Result) -> dict[str, Seen]:
        column, now = result.get_value, monotonic()
        rows: dict[str, Seen] = {}
        for row in range(result.ntuples):
            key, left = column(row, 0) or b"", column(row, 2)
            value = column(row, 3) or b"" if self.values else None
            if value is not None and self.transforms is not None:
                value = self.transforms.listed(key, value)
            ends = NEVER_ENDS if left is None else now + _codec.decode_float8(left)
            rows[key.decode()] = Seen(_codec.decode_int(column(row, 1)), ends, value)
        return rows

    # -- writers that are not pgkv

    def triggers(self) -> str:
        """The commands that let every writer of the table tell of its keys."""
        schema = self.table.schema
        function = "pgkv_watch" if schema is None else f"{quote_identifier(schema)}.pgkv_watch"
        parts = [_FUNCTION.format(function=function)]
        for event, rows in (
            ("INSERT", "NEW"),
            ("UPDATE", "NEW"),
            ("DELETE", "OLD"),
            ("TRUNCATE", ""),
        ):
            parts.append(
                f"CREATE OR REPLACE TRIGGER pgkv_watch_{event.lower()} AFTER {event} ON {self.t}"
                + (f" REFERENCING {rows} TABLE AS changed" if rows else "")
                + f" FOR EACH STATEMENT EXECUTE FUNCTION {function}();\n"
            )
        return "".join(parts)


_FUNCTION = f"""\
CREATE OR REPLACE FUNCTION {{function}}() RETURNS trigger LANGUAGE plpgsql AS $pgkv$
DECLARE
  head text := '[' || to_json(TG_TABLE_SCHEMA::text) || ',' || to_json(TG_TABLE_NAME::text);
  keys text := '';
  item text;
  sent int := 0;
BEGIN
  IF TG_OP <> 'TRUNCATE' THEN
    FOR item IN SELECT ',' || to_json(key) FROM changed LOOP
      IF octet_length(keys) + octet_length(item) > {KEYS_MAX} THEN
        IF sent = {PAYLOADS_MAX} OR octet_length(item) > {KEYS_MAX} THEN
          keys := '';
          sent := -1;
          EXIT;
        END IF;
        PERFORM pg_notify('{CHANNEL}', head || keys || ']');
        sent := sent + 1;
        keys := '';
      END IF;
      keys := keys || item;
    END LOOP;
    IF keys = '' AND sent = 0 THEN RETURN NULL; END IF;
  END IF;
  PERFORM pg_notify('{CHANNEL}', head || keys || ']');
  RETURN NULL;
END $pgkv$;
"""


def _payloads(keys: Iterable[bytes]) -> list[bytes]:
    payloads: list[bytes] = []
    room = 0
    for key in keys:
        item = b"," + json.dumps(key.decode(), ensure_ascii=False).encode()
        if len(item) > room:
            if len(item) > KEYS_MAX or len(payloads) == PAYLOADS_MAX:
                return [b""]
            payloads.append(b"")
            room = KEYS_MAX
        payloads[-1] += item
        room -= len(item)
    return payloads or [b""]
