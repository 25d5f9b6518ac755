"""`idempotent`, a decorator of Django's views: a request with an ``Idempotency-Key`` runs once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Unpack

from django.http import HttpRequest, HttpResponse

from ...patterns.idempotency.api import Idempotency
from ...patterns.web.idempotency import IdempotencyOptions, IdempotentRequests

__all__ = ["idempotent"]


def idempotent(
    idempotency: Idempotency[Any],
    *,
    scope: Callable[[Any], Any] | str,
    **options: Unpack[IdempotencyOptions],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the decorated view once for an ``Idempotency-Key``. For sync views, under WSGI.

    A retry gets the stored response; see `WSGIIdempotencyMiddleware`. A view that raises is not recorded. In
    ``transaction.atomic()``, ``idempotent_attempt(request).complete(response, connection)`` records it in the
    transaction of the effect.

    Args:
        idempotency: an `Idempotency`.
        scope: a function of Django's request that returns whose key it is, or ``""``.
        options: `methods`, `required`, `wait`, `max_request` and `max_body`: see
            :class:`~pgkv.patterns.web.idempotency.IdempotencyOptions`.
    """
    names = ("pgkv.integrations.django.idempotent", "pgkv.integrations.fastapi.Idempotent")
    requests = IdempotentRequests(Idempotency, *names, idempotency, scope, options)

    def decorate(view: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(view)
        def run(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            def make(body: bytes | None, status: int, headers: dict[str, str]) -> HttpResponse:
                return HttpResponse(body or b"", status=status, headers=headers)

            answer = functools.partial(view, request, *args, **kwargs)
            return requests.run(request.META, lambda: request.body, request, answer, make)

        return run

    return decorate
