"""Slots: to which a key belongs, and the schema of each.

A statement of a sharded store is made once, for a table in the schema `ANY`; for a slot the name of its
schema is put in that one's place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from ..config import Config
from ..errors import ConfigError

SLOTS = 32
SLOTS_MAX = 1024
ANY = "pgkv_slot"  # no schema of this name exists


def schema_of(slot: int) -> str:
    """The schema of a slot."""
    return f"pgkv_{slot:02d}"


def settled_count(wanted: int | None, found: int) -> int:
    """How many slots a store is to have.

    Args:
        wanted: None for what it has, or the default.
        found: how many it has; 0 for none.

    Raises:
        ConfigError: it has another number, or that is none.
    """
    count = found or SLOTS if wanted is None else wanted
    if not 1 <= count <= SLOTS_MAX:
        raise ConfigError(f"slots must be from 1 to {SLOTS_MAX:,}, not {count}")
    if found not in (0, count):
        raise ConfigError(
            f"the servers have {found} slots, not {count}: their number is for the life of a store"
        )
    return count


def slot_of_schema(schema: str | None) -> int | None:
    """The slot of a schema; None for `ANY`, which is that of all."""
    return None if schema == ANY else int((schema or "").removeprefix("pgkv_"))


def hashed_part(key: bytes) -> bytes:
    """The text in the first braces, if there is some; else the whole key."""
    begin = key.find(b"{")
    if begin >= 0:
        end = key.find(b"}", begin + 1)
        if end > begin + 1:
            return key[begin + 1 : end]
    return key


@dataclass(frozen=True, slots=True)
class Slots:
    """How many slots there are, and which one a store is limited to.

    Attributes:
        count: for the life of the store.
        own: None for all of them.
    """

    count: int
    own: int | None = None

    def of(self, key: bytes) -> int:
        """The slot of an encoded key."""
        return crc32(hashed_part(key) if b"{" in key else key) % self.count

    def of_id(self, raw: bytes) -> int:
        """The slot of something that is no text: a session's hashed token."""
        return crc32(raw) % self.count

    def check(self, key: bytes) -> bytes:
        """Return the key if it is in the slot that the store is limited to.

        Raises:
            ConfigError: it is in another one.
        """
        if (slot := self.of(key)) != self.own:
            raise apart(key, slot, f"this store has only slot {self.own}")
        return key

    def restrict(self, sql: Any) -> None:
        """Let the statements of a store of one slot refuse keys of others."""
        if self.own is not None:
            key, many_keys = sql.key, sql.many_keys
            sql.key = lambda given: self.check(key(given))
            sql.pair = lambda given, value: (self.check(key(given)), sql.value(value))
            sql.many_keys = lambda given: list(map(self.check, many_keys(given)))

    def require_one(self, keys: Iterable[bytes], what: str) -> None:
        """Refuse keys of several slots.

        Raises:
            ConfigError: there are such; names one.
        """
        first = None
        for key in keys:
            slot = self.of(key)
            if slot != (first := slot if first is None else first):
                raise apart(key, slot, f"this {what} in slot {first}")


def apart(key: bytes, slot: int, other: str) -> ConfigError:
    """The error for keys that one transaction cannot have."""
    return ConfigError(f"{key.decode()!r} is in slot {slot}, {other}: give both keys one {{tag}}")


@dataclass(frozen=True, repr=False)
class ShardedConfig(Config):
    """The settings of a sharded store, or of its part in one slot.

    Attributes:
        fences: of its tables on Citus; None elsewhere.
    """

    shards: Slots | None = None
    fences: Any = None
