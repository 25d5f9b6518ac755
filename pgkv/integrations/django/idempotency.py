"""`idempotent`, a decorator of Django's views: a request with an ``Idempotency-Key`` runs once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, Unpack, cast

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest, HttpResponse

from ...patterns.idempotency.api import AsyncIdempotency, Idempotency
from ...patterns.web.idempotency import IdempotencyOptions, IdempotentRequests
from ...patterns.web.request import scope_of

__all__ = ["idempotent"]

_NAME = "pgkv.integrations.django.idempotent"
View = TypeVar("View", bound=Callable[..., Any])


def idempotent(
    idempotency: Idempotency[Any] | AsyncIdempotency[Any],
    *,
    scope: Callable[[Any], Any] | str,
    **options: Unpack[IdempotencyOptions],
) -> Callable[[View], View]:
    """Run the decorated view once for an ``Idempotency-Key``.

    A retry gets the stored response; see `WSGIIdempotencyMiddleware`. A view that raises is not recorded. In
    ``transaction.atomic()``, ``idempotent_attempt(request).complete(response, connection)`` records it in the
    transaction of the effect; an async view awaits it, with a psycopg connection.

    Args:
        idempotency: an `Idempotency`, or an `AsyncIdempotency` where the view is async.
        scope: a function of Django's request that returns whose key it is, or ``""``.
        options: `methods`, `required`, `wait`, `max_request` and `max_body`: see
            :class:`~pgkv.patterns.web.idempotency.IdempotencyOptions`.

    Raises:
        ConfigError: a setting is wrong, or the idempotency is of the wrong kind for the view.
    """

    def decorate(view: View) -> View:
        is_async = iscoroutinefunction(view)
        kind: Any = AsyncIdempotency if is_async else Idempotency
        names = (f"{_NAME} of this view", f"{_NAME} of the other kind of view")
        requests = IdempotentRequests(kind, *names, idempotency, scope, options)
        run = requests.run_async if is_async else requests.run

        @functools.wraps(view)
        def answer(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            def make(body: bytes | None, status: int, headers: dict[str, str]) -> HttpResponse:
                return HttpResponse(body or b"", status=status, headers=headers)

            # ASGI's requests have their whole body before the view is called.
            call = functools.partial(view, request, *args, **kwargs)
            return run(scope_of(request), lambda: request.body, request, call, make)

        @functools.wraps(view)
        async def answer_async(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            return await answer(request, *args, **kwargs)

        return cast("View", answer_async if is_async else answer)

    return decorate
