"""Idempotency keys: work runs once for a key, and retries get the first outcome."""

from .api import (
    AsyncAttempt,
    AsyncIdempotency,
    Attempt,
    Idempotency,
    IdempotencyRecord,
    idempotent,
)

__all__ = [
    "AsyncAttempt",
    "AsyncIdempotency",
    "Attempt",
    "Idempotency",
    "IdempotencyRecord",
    "idempotent",
]
