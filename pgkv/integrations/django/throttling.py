"""Throttles for Django REST framework: its own classes, with one atomic statement for a request.

::

    REST_FRAMEWORK = {
        "DEFAULT_THROTTLE_CLASSES": ["pgkv.integrations.django.throttling.UserThrottle"],
        "DEFAULT_THROTTLE_RATES": {"user": "100/min"},
    }

REST framework's read a list from the cache and write it back, so that requests at the same time
count once. These charge a token bucket: ``100/min`` admits 100 at once, then one each 0.6 s.
"""

from __future__ import annotations

import functools
from typing import Any

from rest_framework import throttling

from ...patterns.rate_limit.api import RateLimiter
from ...patterns.rate_limit.rate import Rate
from ...store import Store
from .stores import STORES, config_for

__all__ = ["AnonThrottle", "ScopedThrottle", "Throttle", "UserThrottle"]


class Throttle(throttling.SimpleRateThrottle):
    """The base of the throttles; a subclass of your own has a ``scope`` or ``rate``, and
    ``get_cache_key``.

    Attributes:
        location: an alias of ``DATABASES``, or a DSN.
    """

    location = ""
    num_requests: int  # both are SimpleRateThrottle's, and missing in its stubs
    duration: int

    def allow_request(self, request: Any, view: Any) -> bool:
        """Charge the client; False if the request is refused."""
        key = None if self.rate is None else self.get_cache_key(request, view)
        if key is None:
            return True
        self._decision = _limiter(
            STORES.get(config_for(self.location, {})), self.num_requests, self.duration
        ).hit(key)
        return bool(self._decision.allowed)

    def wait(self) -> float:
        """Return the seconds until the client may try again."""
        return float(self._decision.retry_after)


class UserThrottle(throttling.UserRateThrottle, Throttle):
    """``UserRateThrottle``: by user, else by address."""


class AnonThrottle(throttling.AnonRateThrottle, Throttle):
    """``AnonRateThrottle``: clients without a login, by address."""


class ScopedThrottle(throttling.ScopedRateThrottle, Throttle):
    """``ScopedRateThrottle``: by the view's ``throttle_scope``."""


@functools.lru_cache(maxsize=256)
def _limiter(store: Store, requests: int, seconds: int) -> RateLimiter:
    return RateLimiter(store, Rate(requests, seconds), name="drf", on_error="open")
