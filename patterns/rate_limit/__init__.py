"""Rate limits: a token bucket per key, shared by all processes."""

from .api import (
    AsyncRateLimiter,
    AsyncReservation,
    Decision,
    LimiterCounts,
    Rate,
    RateLimiter,
    Reservation,
)

__all__ = [
    "AsyncRateLimiter",
    "AsyncReservation",
    "Decision",
    "LimiterCounts",
    "Rate",
    "RateLimiter",
    "Reservation",
]
