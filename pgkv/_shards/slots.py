"""Slots: to which a key belongs, and the schema of each.

A statement of a sharded store is made once, for a table in the schema `ANY`; for a slot the name of its
schema is put in that one's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

from ..config import Config
from ..errors import ConfigError

SLOTS = 32
SLOTS_MAX = 1024
ANY = "pgkv_slot"  # no schema of this name exists


def schema_of(slot: int) -> str:
    """The schema of a slot."""
    return f"pgkv_{slot:02d}"


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
        if self.own is not None and (slot := self.of(key)) != self.own:
            raise apart(key, slot, f"this store has only slot {self.own}")
        return key

    def check_id(self, raw: bytes) -> bytes:
        """The same for a session.

        Raises:
            ConfigError: it is in another slot.
        """
        if self.own is not None and self.of_id(raw) != self.own:
            raise ConfigError(
                f"the session is in slot {self.of_id(raw)}, this store has only slot {self.own}: "
                "use the sharded store itself"
            )
        return raw


def apart(key: bytes, slot: int, other: str) -> ConfigError:
    """The error for keys that one transaction cannot have."""
    return ConfigError(f"{key.decode()!r} is in slot {slot}, {other}: give both keys one {{tag}}")


@dataclass(frozen=True, repr=False)
class ShardedConfig(Config):
    """The settings of a sharded store, or of its part in one slot."""

    shards: Slots | None = None
