"""Rate limits: a token bucket or calendar window per key, shared by all processes."""

from .api import (
    AsyncRateLimiter,
    AsyncReservation,
    Decision,
    LimiterCounts,
    Quota,
    Rate,
    RateLimiter,
    Reservation,
)

__all__ = [
    "AsyncRateLimiter",
    "AsyncReservation",
    "Decision",
    "LimiterCounts",
    "Quota",
    "Rate",
    "RateLimiter",
    "Reservation",
]
